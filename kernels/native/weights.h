// A weight of few bits as a call gives it, and what every level of instructions shares.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

#define INLINE __attribute__((always_inline)) inline

namespace lean {

namespace ffi = xla::ffi;

constexpr int64_t PANEL = 64;     // columns
constexpr int64_t QUAD = 256;     // bytes of a panel's four rows of bytes

inline int64_t Up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Memory that begins with a line of the cache: vectors and tiles that lie in two are slow.
template <class T>
struct Lines {
  using value_type = T;
  Lines() = default;
  template <class U> Lines(const Lines<U>&) {}
  T* allocate(size_t n) {
    return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64)));
  }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const Lines&) const { return true; }
  bool operator!=(const Lines&) const { return false; }
};
template <class T>
using Array = std::vector<T, Lines<T>>;

// Calls f(0) ... f(count - 1) on the threads of XLA's pool. The caller takes parts too, and waits
// for none that nobody has begun: operations that run at once cannot wait for each other.
template <class F>
void Parallel(ffi::ThreadPool& pool, int64_t count, F f) {
  struct State { std::atomic<int64_t> next{0}, left; };
  const int64_t threads = std::min<int64_t>(pool.num_threads(), count);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  auto state = std::make_shared<State>();
  state->left = count;
  auto work = [state, count, &f] {
    // f is the caller's, who is there as long as a part is left.
    for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
      f(i);
      state->left.fetch_sub(1, std::memory_order_release);
    }
  };
  for (int64_t t = 1; t < threads; ++t) pool.Schedule(std::function<void()>(work));
  work();
  while (state->left.load(std::memory_order_acquire) > 0) std::this_thread::yield();
}

struct Scale {
  const void* data;
  ffi::DataType type;
  int64_t columns;                // N, or 1 where one serves all columns

  // Those of a group and `count` columns from n on; what is past them is 0.
  void Read(int64_t group, int64_t n, int64_t count, float* out) const {
    const int64_t at = columns == 1 ? group : group * columns + n;
    const int64_t step = columns == 1 ? 0 : 1;
    auto each = [&](auto value) {
      for (int64_t i = 0; i < count; ++i) out[i] = value(at + i * step);
    };
    switch (type) {
      case ffi::DataType::F32: {
        const float* p = static_cast<const float*>(data);
        each([p](int64_t i) { return p[i]; });
        break;
      }
      case ffi::DataType::BF16: {
        const uint16_t* p = static_cast<const uint16_t*>(data);
        each([p](int64_t i) { return Bits(static_cast<uint32_t>(p[i]) << 16); });
        break;
      }
      default: {                  // exponents of two; 255 is a NaN
        const uint8_t* p = static_cast<const uint8_t*>(data);
        each([p](int64_t i) {
          if (p[i] == 255) return std::numeric_limits<float>::quiet_NaN();
          return Bits(p[i] ? static_cast<uint32_t>(p[i]) << 23 : 1u << 22);
        });
      }
    }
    for (int64_t i = count; i < PANEL; ++i) out[i] = 0;
  }

  // Asks for the first of what `Read` will read.
  void Ahead(int64_t group, int64_t n) const {
    const int64_t size = type == ffi::DataType::F32 ? 4 : type == ffi::DataType::BF16 ? 2 : 1;
    const char* p = static_cast<const char*>(data) + (columns == 1 ? group : group * columns + n) *
                    size;
    for (int64_t i = 0; i < PANEL * size && columns > 1; i += 64) __builtin_prefetch(p + i);
  }

  static float Bits(uint32_t bits) {
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
  }
};

// Codes [K N]; those of four and two bits are packed along K. In rows as they are saved, or in
// panels of 64 columns, one after the other: of each four rows of bytes, four bytes a column.
struct Weight {
  const uint8_t* data;            // [rows of bytes, N], or [panels, quads, 64, 4]
  int64_t K, N, group, bits;
  bool is_signed, panels;         // codes of eight bits; the layout
  Scale scale;
  const uint8_t* zero;            // as scales, or null
  const float* table;             // what codes of four and two bits are, 16 of them
  int64_t groups() const { return (K + group - 1) / group; }
  int64_t each() const { return 8 / bits; }           // codes in a byte
  int64_t byte_rows() const { return (K + each() - 1) / each(); }
  int64_t quads() const { return (byte_rows() + 3) / 4; }
  int64_t count(int64_t n) const { return std::min(PANEL, N - n); }
};

// A matrix of activations in eight bits, each group's at a multiple of `pitch`, zeros between them;
// in tiles of 16 rows and 64 bytes, [M / 16, stride / 64, 16, 64], where the tiles' units read them.
struct Rounded {
  Array<int8_t> codes;            // [M stride]
  Array<float> floats;            // [M K], the codes; of the levels that multiply floats
  std::vector<int32_t> sums;      // [M G]
  std::vector<float> steps;       // [M]
  int64_t pitch, stride, G;
};

// Calls f(first column) for each panel, on the threads of XLA's pool.
template <class F>
void EachPanel(ffi::ThreadPool& pool, const Weight& w, F f) {
  Parallel(pool, (w.N + PANEL - 1) / PANEL, [&](int64_t p) { f(p * PANEL); });
}

inline void Zeros(const Weight& w, int64_t g, int64_t n, int64_t count, float* out) {
  std::fill(out, out + PANEL, 0.f);
  if (!w.zero) return;
  for (int64_t i = 0; i < count; ++i)
    out[i] = w.zero[w.scale.columns == 1 ? g : g * w.N + n + i];
}

}  // namespace lean
