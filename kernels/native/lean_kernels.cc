// Products with weights of few bits for CPUs, called by XLA (kernels/native/__init__.py).
//
// A weight stays as it is saved: codes [K N], those of four and two bits packed along K, scales
// [G N]. It is read in panels of 64 columns. What is multiplied in integers is laid out four rows
// to a lane as the instruction vpdpbusd wants them: in registers for one row of activations, in a
// buffer that stays in the cache for more. Weights are the unsigned side of it (code + 128, or + 8
// of four bits), so that what has to be taken off is a multiple of the sum of a row's activations.
//
// Three levels are chosen between at run time: AVX512-VNNI, AVX2, and C++ that any CPU runs.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")))
#define AVX2 __attribute__((target("avx2,fma")))
#endif
#define INLINE __attribute__((always_inline)) inline

namespace ffi = xla::ffi;

namespace {

constexpr int64_t PANEL = 64;     // columns
constexpr int64_t DEPTH = 512;    // rows of a panel that are laid out at a time
constexpr int64_t DEEP = 16;      // rows of bytes that one row of activations meets at a time
constexpr int64_t SPAN = 4096;    // columns whose sums stay in the nearest cache
constexpr int64_t ROWS = 384;     // of activations, whose sums stay in the cache

int Level() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) return 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

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
      default: {                  // exponents of two
        const uint8_t* p = static_cast<const uint8_t*>(data);
        each([p](int64_t i) { return Bits(p[i] ? static_cast<uint32_t>(p[i]) << 23 : 1u << 22); });
      }
    }
    for (int64_t i = count; i < PANEL; ++i) out[i] = 0;
  }

  static float Bits(uint32_t bits) {
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
  }
};

struct Weight {
  const uint8_t* data;            // [rows of bytes, N]
  int64_t K, N, group, bits;
  bool is_signed;                 // codes of eight bits
  Scale scale;
  const uint8_t* zero;            // as scales, or null
  const float* table;             // what codes of four and two bits are, 16 of them
  int64_t groups() const { return (K + group - 1) / group; }
  int64_t each() const { return 8 / bits; }           // codes in a byte
  int64_t byte_rows() const { return (K + each() - 1) / each(); }
};

// A matrix of activations in eight bits. Rows of weights of four bits are laid out eight at a time,
// the even ones first; so are these.
struct Rounded {
  std::vector<int8_t> codes;      // [M stride]
  std::vector<int32_t> sums;      // [M G]
  std::vector<float> steps;       // [M]
  int64_t stride, G;
};

// The row's codes as they stand, its step: NaN where one of its numbers is.
INLINE float RoundRow(const float* x, int64_t K, const float* fixed, int8_t* out) {
  float top = 0;
  bool nan = false;
  for (int64_t k = 0; k < K; ++k) {
    const float size = std::fabs(x[k]);
    nan |= size != size;
    top = size > top ? size : top;
  }
  const float step = nan ? std::numeric_limits<float>::quiet_NaN()
                         : fixed ? *fixed : top == 0 ? 1.f : top * (1.f / 127);
  const float inverse = 1 / step;
  for (int64_t k = 0; k < K; ++k) {
    const float unit = std::nearbyint(x[k] * inverse);
    const float kept = unit > -127 ? unit < 127 ? unit : 127.f : -127.f;      // of NaN: -127
    out[k] = static_cast<int8_t>(unit == unit ? kept : 0.f);
  }
  return step;
}

#if defined(__x86_64__)
AVX512 float RoundRow512(const float* x, int64_t K, const float* fixed, int8_t* out) {
  return RoundRow(x, K, fixed, out);
}
AVX2 float RoundRow2(const float* x, int64_t K, const float* fixed, int8_t* out) {
  return RoundRow(x, K, fixed, out);
}
#endif
float RoundRow0(const float* x, int64_t K, const float* fixed, int8_t* out) {
  return RoundRow(x, K, fixed, out);
}

void RoundOne(const float* x, const Weight& w, const float* fixed, int level, int64_t m,
              Rounded& out) {
  int8_t* codes = out.codes.data() + m * out.stride;
#if defined(__x86_64__)
  auto round = level == 2 ? RoundRow512 : level == 1 ? RoundRow2 : RoundRow0;
#else
  auto round = RoundRow0;
#endif
  out.steps[m] = round(x + m * w.K, w.K, fixed, codes);
  for (int64_t g = 0; g < out.G; ++g) {
    int32_t sum = 0;
    for (int64_t k = g * w.group; k < std::min(w.K, (g + 1) * w.group); ++k) sum += codes[k];
    out.sums[m * out.G + g] = sum;
  }
  if (w.bits == 4 && level == 2) {
    for (int64_t k = 0; k < w.K; k += 8) {
      int8_t was[8];
      std::memcpy(was, codes + k, 8);
      for (int i = 0; i < 4; ++i) {
        codes[k + i] = was[2 * i];
        codes[k + 4 + i] = was[2 * i + 1];
      }
    }
  }
}

// ---------------------------------------------------------------- any CPU

// Codes of rows [first, last) and a panel's columns as integers [rows PANEL].
template <class T>
INLINE void Codes(const Weight& w, int64_t first, int64_t last, int64_t n, int64_t count, T* out) {
  for (int64_t k = first; k < last; ++k, out += PANEL) {
    const uint8_t* row = w.data + k / w.each() * w.N + n;
    const int shift = static_cast<int>(k % w.each() * w.bits), mask = (1 << w.bits) - 1;
    for (int64_t i = 0; i < count; ++i) {
      out[i] = w.bits == 8 ? (w.is_signed ? static_cast<T>(static_cast<int8_t>(row[i]))
                                          : static_cast<T>(row[i]))
                           : static_cast<T>(row[i] >> shift & mask);
    }
    for (int64_t i = count; i < PANEL; ++i) out[i] = 0;
  }
}

INLINE void IntegerPanel(const Rounded& x, const Weight& w, int64_t M, int64_t n, float* y) {
  const int64_t count = std::min(PANEL, w.N - n);
  std::vector<int16_t> codes(std::min(DEPTH, w.group) * PANEL);
  std::vector<int32_t> sums(M * PANEL);
  std::vector<float> total(M * PANEL, 0.f);
  float scale[PANEL];
  for (int64_t g = 0; g < w.groups(); ++g) {
    const int64_t end = std::min(w.K, (g + 1) * w.group);
    std::fill(sums.begin(), sums.end(), 0);
    for (int64_t first = g * w.group; first < end; first += DEPTH) {
      const int64_t last = std::min(end, first + DEPTH);
      Codes(w, first, last, n, count, codes.data());
      if (w.bits == 4)
        for (auto& code : codes) code = static_cast<int16_t>((code ^ 8) - 8);
      for (int64_t m = 0; m < M; ++m) {
        int32_t* sum = sums.data() + m * PANEL;
        for (int64_t k = first; k < last; ++k) {
          const int32_t a = x.codes[m * x.stride + k];
          const int16_t* b = codes.data() + (k - first) * PANEL;
          for (int64_t i = 0; i < PANEL; ++i) sum[i] += a * b[i];
        }
      }
    }
    w.scale.Read(g, n, count, scale);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t i = 0; i < PANEL; ++i)
        total[m * PANEL + i] += static_cast<float>(sums[m * PANEL + i]) * scale[i];
  }
  for (int64_t m = 0; m < M; ++m)
    for (int64_t i = 0; i < count; ++i) y[m * w.N + n + i] = total[m * PANEL + i] * x.steps[m];
}

// The numbers of rows [first, last) of one group as floats [rows PANEL].
INLINE void Floats(const Weight& w, int64_t first, int64_t last, int64_t n, int64_t count,
                   const float* scale, const float* zero, float* out) {
  int16_t codes[PANEL];
  for (int64_t k = first; k < last; ++k, out += PANEL) {
    Codes(w, k, k + 1, n, count, codes);
    for (int64_t i = 0; i < PANEL; ++i) {
      const float code = w.bits == 8 ? static_cast<float>(codes[i]) : w.table[codes[i]];
      out[i] = (code - zero[i]) * scale[i];
    }
  }
}

void Zeros(const Weight& w, int64_t g, int64_t n, int64_t count, float* out) {
  std::fill(out, out + PANEL, 0.f);
  if (!w.zero) return;
  for (int64_t i = 0; i < count; ++i)
    out[i] = w.zero[w.scale.columns == 1 ? g : g * w.N + n + i];
}

INLINE void FloatPanel(const float* x, const Weight& w, int64_t M, int64_t n, float* y) {
  const int64_t count = std::min(PANEL, w.N - n);
  constexpr int64_t depth = 64;
  std::vector<float> values(depth * PANEL), total(M * PANEL, 0.f);
  float scale[PANEL], zero[PANEL];
  for (int64_t g = 0; g < w.groups(); ++g) {
    const int64_t end = std::min(w.K, (g + 1) * w.group);
    w.scale.Read(g, n, count, scale);
    Zeros(w, g, n, count, zero);
    for (int64_t first = g * w.group; first < end; first += depth) {
      const int64_t last = std::min(end, first + depth);
      Floats(w, first, last, n, count, scale, zero, values.data());
      for (int64_t m = 0; m < M; ++m)
        for (int64_t k = first; k < last; ++k) {
          const float a = x[m * w.K + k];
          const float* b = values.data() + (k - first) * PANEL;
          for (int64_t i = 0; i < PANEL; ++i) total[m * PANEL + i] += a * b[i];
        }
    }
  }
  for (int64_t m = 0; m < M; ++m)
    std::copy_n(total.data() + m * PANEL, count, y + m * w.N + n);
}

void IntegerPanel0(const Rounded& x, const Weight& w, int64_t M, int64_t n, float* y) {
  IntegerPanel(x, w, M, n, y);
}
void FloatPanel0(const float* x, const Weight& w, int64_t M, int64_t n, float* y) {
  FloatPanel(x, w, M, n, y);
}

#if defined(__x86_64__)
AVX2 void IntegerPanel2(const Rounded& x, const Weight& w, int64_t M, int64_t n, float* y) {
  IntegerPanel(x, w, M, n, y);
}
AVX2 void FloatPanel2(const float* x, const Weight& w, int64_t M, int64_t n, float* y) {
  FloatPanel(x, w, M, n, y);
}

// ---------------------------------------------------------------- AVX512-VNNI

struct Four { __m512i v[4]; };

AVX512 INLINE __mmask64 Mask(int64_t count) {
  return count >= 64 ? ~0ull : (1ull << count) - 1;
}

// Row `k` of bytes, 64 columns from n on; zeros past the end.
AVX512 INLINE __m512i Row(const Weight& w, int64_t k, int64_t n, __mmask64 mask, int64_t rows) {
  return k < rows ? _mm512_maskz_loadu_epi8(mask, w.data + k * w.N + n) : _mm512_setzero_si512();
}

// Asks for what will be read next; what is past the end does no harm.
INLINE void Ahead(const Weight& w, int64_t k, int64_t n) {
  __builtin_prefetch(w.data + k * w.N + n);
}

// Four rows of 64 bytes, four to a lane: of v[j], 128-bit part p is columns 16 p + 4 j to + 3.
AVX512 INLINE Four Interleaved(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab0 = _mm512_unpacklo_epi8(a, b), ab1 = _mm512_unpackhi_epi8(a, b);
  const __m512i cd0 = _mm512_unpacklo_epi8(c, d), cd1 = _mm512_unpackhi_epi8(c, d);
  return {{_mm512_unpacklo_epi16(ab0, cd0), _mm512_unpackhi_epi16(ab0, cd0),
           _mm512_unpacklo_epi16(ab1, cd1), _mm512_unpackhi_epi16(ab1, cd1)}};
}

// 128-bit part p of v[j] becomes part j of v[p]: columns in order, of what `Interleaved` gives.
AVX512 INLINE Four InOrder(const Four& u) {
  const __m512i a0 = _mm512_shuffle_i32x4(u.v[0], u.v[1], 0x44);
  const __m512i a1 = _mm512_shuffle_i32x4(u.v[2], u.v[3], 0x44);
  const __m512i b0 = _mm512_shuffle_i32x4(u.v[0], u.v[1], 0xEE);
  const __m512i b1 = _mm512_shuffle_i32x4(u.v[2], u.v[3], 0xEE);
  return {{_mm512_shuffle_i32x4(a0, a1, 0x88), _mm512_shuffle_i32x4(a0, a1, 0xDD),
           _mm512_shuffle_i32x4(b0, b1, 0x88), _mm512_shuffle_i32x4(b0, b1, 0xDD)}};
}

// sums + products of unsigned and signed bytes, four to a lane. Written out, since GCC 12 keeps the
// sums of its own function for it in memory.
AVX512 INLINE __m512i Dot(__m512i sums, __m512i bytes, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(bytes), "v"(x));
  return sums;
}

AVX512 INLINE __m512i Low(__m512i bytes) {             // code + 8 of the lower halves
  return _mm512_xor_si512(_mm512_and_si512(bytes, _mm512_set1_epi8(15)), _mm512_set1_epi8(8));
}
AVX512 INLINE __m512i High(__m512i bytes) { return Low(_mm512_srli_epi16(bytes, 4)); }

AVX512 INLINE __m512i Broadcast(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

// One row of activations times rows [k0, k1) of the weight and columns [n, n + count), at most SPAN.
// What is read at a time is four rows of bytes, each as long as it may be: memory gives most so.
// `total` is what the groups add to y; of a single group `whole` gets its sums, nothing taken off.
template <int BITS>
AVX512 void IntegerRow(const Rounded& x, const Weight& w, int64_t k0, int64_t k1, int64_t n,
                       int64_t count, int32_t* whole, float* total) {
  constexpr int64_t quad = BITS == 4 ? 8 : 4, deep = DEEP / 4 * quad;
  alignas(64) int32_t sums[SPAN];
  alignas(64) float scale[PANEL];
  const int64_t rows = w.byte_rows(), blocks = (count + PANEL - 1) / PANEL;
  for (int64_t g = k0 / w.group; g * w.group < k1; ++g) {
    const int64_t first = std::max(k0, g * w.group), last = std::min(k1, (g + 1) * w.group);
    for (int64_t k = first; k < last; k += deep) {
      const int64_t own = std::min(DEEP / 4, (last - k + quad - 1) / quad);
      for (int64_t j = 0; j < blocks; ++j) {
        int32_t* sum = sums + j * PANEL;
        const __mmask64 mask = Mask(count - j * PANEL);
        __m512i acc[4];
        for (int i = 0; i < 4; ++i)
          acc[i] = k == first ? _mm512_setzero_si512() : _mm512_load_si512(sum + 16 * i);
        for (int64_t q = 0; q < own; ++q) {
          const int8_t* a = x.codes.data() + k + q * quad;
          const __m512i even = Broadcast(a), odd = Broadcast(a + 4);
          __m512i r[4];
          for (int i = 0; i < 4; ++i) {
            const int64_t row = k / w.each() + 4 * q + i;
            r[i] = Row(w, row, n + j * PANEL, mask, rows);
            Ahead(w, row + DEEP, n + j * PANEL);
            if (BITS == 8) r[i] = _mm512_xor_si512(r[i], _mm512_set1_epi8(-128));
          }
          const Four u = Interleaved(r[0], r[1], r[2], r[3]);
          for (int i = 0; i < 4; ++i) {
            if (BITS == 8) {
              acc[i] = Dot(acc[i], u.v[i], even);
            } else {
              acc[i] = Dot(acc[i], Low(u.v[i]), even);
              acc[i] = Dot(acc[i], High(u.v[i]), odd);
            }
          }
        }
        for (int i = 0; i < 4; ++i) _mm512_store_si512(sum + 16 * i, acc[i]);
      }
    }
    const __m512i off = _mm512_set1_epi32(x.sums[g] * (BITS == 4 ? 8 : 128));
    for (int64_t j = 0; j < blocks; ++j) {
      Four u;
      for (int i = 0; i < 4; ++i) u.v[i] = _mm512_load_si512(sums + j * PANEL + 16 * i);
      u = InOrder(u);
      if (whole) {
        for (int i = 0; i < 4; ++i) _mm512_storeu_si512(whole + j * PANEL + 16 * i, u.v[i]);
        continue;
      }
      w.scale.Read(g, n + j * PANEL, std::min(PANEL, count - j * PANEL), scale);
      for (int i = 0; i < 4; ++i) {
        float* out = total + j * PANEL + 16 * i;
        const __m512 value = _mm512_cvtepi32_ps(_mm512_sub_epi32(u.v[i], off));
        _mm512_storeu_ps(out, _mm512_fmadd_ps(value, _mm512_load_ps(scale + 16 * i),
                                              _mm512_loadu_ps(out)));
      }
    }
  }
}

// How a product with few rows of activations is shared: columns in spans, rows in parts that begin
// with a group, or anywhere in a single one. Each part has sums of its own.
struct Parts {
  int64_t spans, span, parts, part, stride;
  Parts(const Weight& w, int64_t threads, int64_t most) {
    spans = (w.N + most - 1) / most;
    span = ((w.N + spans - 1) / spans + PANEL - 1) / PANEL * PANEL;
    spans = (w.N + span - 1) / span;
    const int64_t unit = w.groups() > 1 ? w.group : 64, units = (w.K + unit - 1) / unit;
    parts = std::max<int64_t>(1, std::min(units, (threads + spans - 1) / spans));
    part = (units + parts - 1) / parts * unit;
    parts = (w.K + part - 1) / part;
    stride = spans * span;
  }
};

void IntegerOne(ffi::ThreadPool& pool, const Rounded& x, const Weight& w, float* y) {
  const Parts p(w, pool.num_threads(), SPAN);
  const bool single = w.groups() == 1;
  std::vector<float> total(single ? 0 : p.parts * p.stride, 0.f);
  std::vector<int32_t> sums(single ? p.parts * p.stride : 0);
  auto row = w.bits == 4 ? IntegerRow<4> : IntegerRow<8>;
  Parallel(pool, p.parts * p.spans, [&](int64_t i) {
    const int64_t k = i / p.spans, n = i % p.spans * p.span, at = k * p.stride + n;
    row(x, w, k * p.part, std::min(w.K, (k + 1) * p.part), n, std::min(p.span, w.N - n),
        single ? sums.data() + at : nullptr, single ? nullptr : total.data() + at);
  });
  float scale[PANEL];
  for (int64_t n = 0; n < w.N; n += PANEL) {
    const int64_t count = std::min(PANEL, w.N - n);
    if (single) w.scale.Read(0, n, count, scale);
    for (int64_t i = 0; i < count; ++i) {
      float all = 0;
      int32_t sum = single ? -x.sums[0] * (w.bits == 4 ? 8 : 128) : 0;
      for (int64_t k = 0; k < p.parts; ++k) {
        if (single) sum += sums[k * p.stride + n + i];
        else all += total[k * p.stride + n + i];
      }
      y[n + i] = (single ? static_cast<float>(sum) * scale[i] : all) * x.steps[0];
    }
  }
}

// Rows [first, last) of panels from column n on, four to a lane: each [DEPTH / 4, 64 columns, 4].
// All panels of four rows are read before the next rows: memory gives long pieces faster.
AVX512 void LayOut(const Weight& w, int64_t first, int64_t last, int64_t n, int64_t panels,
                   uint8_t* out) {
  const int64_t rows = w.byte_rows(), each = w.bits == 4 ? 8 : 4;
  for (int64_t k = first; k < last; k += each) {
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t byte = k / w.each(), at = n + p * PANEL;
      const __mmask64 mask = Mask(w.N - at);
      uint8_t* to = out + p * DEPTH * PANEL + (k - first) * PANEL;
      __m512i r[4];
      for (int i = 0; i < 4; ++i) r[i] = Row(w, byte + i, at, mask, rows);
      const Four u = InOrder(Interleaved(r[0], r[1], r[2], r[3]));
      for (int i = 0; i < 4; ++i, to += 64)
        _mm512_storeu_si512(to, w.bits == 4 ? Low(u.v[i])
                                            : _mm512_xor_si512(u.v[i], _mm512_set1_epi8(-128)));
      if (w.bits == 4)
        for (int i = 0; i < 4; ++i, to += 64) _mm512_storeu_si512(to, High(u.v[i]));
    }
  }
}

// How many panels a thread takes at a time: what M rows of sums and they take stays in its cache.
int64_t Panels(int64_t M) { return M <= 64 ? 8 : M <= 128 ? 4 : M <= 256 ? 2 : 1; }

// Calls tile(how many rows, from which) on rows [m, end): six at a time, and what is left.
template <class F>
INLINE void Tiled(int64_t m, int64_t end, F tile) {
  for (; m + 6 <= end; m += 6) tile(std::integral_constant<int, 6>(), m);
  switch (end - m) {
    case 5: return tile(std::integral_constant<int, 5>(), m);
    case 4: return tile(std::integral_constant<int, 4>(), m);
    case 3: return tile(std::integral_constant<int, 3>(), m);
    case 2: return tile(std::integral_constant<int, 2>(), m);
    case 1: return tile(std::integral_constant<int, 1>(), m);
  }
}

// Sums of MT rows of activations with a laid out panel. `start`, `end`: of a group.
template <int MT>
AVX512 void IntegerTile(const int8_t* a, int64_t stride, const uint8_t* b, int64_t quads,
                        bool start, bool end, const int32_t* row_sums, int64_t G, int32_t offset,
                        const float* scale, int32_t* sums, float* total) {
  __m512i acc[MT][4];
  for (int i = 0; i < MT; ++i)
    for (int j = 0; j < 4; ++j)
      acc[i][j] = start ? _mm512_setzero_si512() : _mm512_loadu_si512(sums + i * PANEL + 16 * j);
  for (int64_t q = 0; q < quads; ++q, b += 256) {
    __m512i w[4];
    for (int j = 0; j < 4; ++j) w[j] = _mm512_loadu_si512(b + 64 * j);
    for (int i = 0; i < MT; ++i) {
      const __m512i x = Broadcast(a + i * stride + 4 * q);
      for (int j = 0; j < 4; ++j) acc[i][j] = Dot(acc[i][j], w[j], x);
    }
  }
  if (!end) {
    for (int i = 0; i < MT; ++i)
      for (int j = 0; j < 4; ++j) _mm512_storeu_si512(sums + i * PANEL + 16 * j, acc[i][j]);
    return;
  }
  for (int i = 0; i < MT; ++i) {
    const __m512i off = _mm512_set1_epi32(row_sums[i * G] * offset);
    for (int j = 0; j < 4; ++j) {
      float* out = total + i * PANEL + 16 * j;
      _mm512_storeu_ps(out, _mm512_fmadd_ps(
          _mm512_cvtepi32_ps(_mm512_sub_epi32(acc[i][j], off)), _mm512_loadu_ps(scale + 16 * j),
          _mm512_loadu_ps(out)));
    }
  }
}

AVX512 void IntegerPanels512(const Rounded& x, const Weight& w, int64_t M, int64_t n,
                             int64_t panels, float* y) {
  const int64_t each = w.bits == 4 ? 8 : 4;
  static thread_local std::vector<uint8_t> b;
  static thread_local std::vector<int32_t> sums;
  static thread_local std::vector<float> total;
  b.resize((panels * DEPTH + 8) * PANEL);
  alignas(64) float scale[PANEL];
  for (int64_t m0 = 0; m0 < M; m0 += ROWS) {
    const int64_t m1 = std::min(M, m0 + ROWS), size = (m1 - m0) * PANEL;
    sums.resize(panels * size);
    total.assign(panels * size, 0.f);
    for (int64_t g = 0; g < w.groups(); ++g) {
      const int64_t end = std::min(w.K, (g + 1) * w.group);
      for (int64_t first = g * w.group; first < end; first += DEPTH) {
        const int64_t last = std::min(end, first + DEPTH);
        LayOut(w, first, last, n, panels, b.data());
        const int64_t quads = (last - first + each - 1) / each * each / 4;
        for (int64_t p = 0; p < panels; ++p) {
          w.scale.Read(g, n + p * PANEL, std::min(PANEL, w.N - n - p * PANEL), scale);
          auto tile = [&](auto rows, int64_t m) {
            IntegerTile<decltype(rows)::value>(
                x.codes.data() + m * x.stride + first, x.stride, b.data() + p * DEPTH * PANEL,
                quads, first == g * w.group, last == end, x.sums.data() + m * x.G + g, x.G,
                w.bits == 4 ? 8 : 128, scale, sums.data() + p * size + (m - m0) * PANEL,
                total.data() + p * size + (m - m0) * PANEL);
          };
          Tiled(m0, m1, tile);
        }
      }
    }
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t m = m0; m < m1; ++m)
        for (int64_t i = 0; i < std::min(PANEL, w.N - n - p * PANEL); ++i)
          y[m * w.N + n + p * PANEL + i] = total[p * size + (m - m0) * PANEL + i] * x.steps[m];
  }
}

// What 16 bytes of codes stand for, the codes `shift` bits up in each.
template <int BITS>
AVX512 INLINE __m512 Numbers(__m512i bytes, int shift, __m512 table) {
  if (BITS == 8) return _mm512_cvtepi32_ps(bytes);
  return _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, shift), table);  // looks at four bits
}

template <int BITS>
AVX512 INLINE __m512i Bytes16(const Weight& w, const uint8_t* p, __mmask16 mask) {
  const __m128i bytes = _mm_maskz_loadu_epi8(mask, p);
  return BITS == 8 && w.is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
}

// MT rows of floats times rows [k0, k1) of the weight and columns [n, n + count), at most SPAN / MT:
// sums of a group's products with the bare numbers, then its scales. total: [MT stride].
template <int BITS, int MT>
AVX512 void FloatRows(const float* x, const Weight& w, int64_t k0, int64_t k1, int64_t n,
                      int64_t count, int64_t stride, float* total) {
  constexpr int64_t each = 8 / BITS, deep = DEEP * each;
  alignas(64) float sums[MT][SPAN / MT], scale[PANEL], zero[PANEL];
  const int64_t blocks = (count + PANEL - 1) / PANEL;
  const __m512 table = BITS == 8 ? _mm512_setzero_ps() : _mm512_loadu_ps(w.table);
  for (int64_t g = k0 / w.group; g * w.group < k1; ++g) {
    const int64_t first = std::max(k0, g * w.group), last = std::min(k1, (g + 1) * w.group);
    float x_sum[MT] = {};
    for (int i = 0; i < MT && w.zero; ++i)
      for (int64_t k = first; k < last; ++k) x_sum[i] += x[i * w.K + k];
    for (int64_t k = first; k < last; k += deep) {
      const int64_t own = std::min(DEEP, (last - k + each - 1) / each);
      float a[MT][deep];                               // of these rows, zeros past the last
      for (int i = 0; i < MT; ++i)
        for (int64_t r = 0; r < deep; ++r) a[i][r] = k + r < last ? x[i * w.K + k + r] : 0.f;
      const uint8_t* bytes = w.data + k / each * w.N + n;
      for (int64_t j = 0; j < count; j += 16) {
        const __mmask16 mask = count - j >= 16 ? 0xFFFF : (1u << (count - j)) - 1;
        __m512 acc[MT];
        for (int i = 0; i < MT; ++i)
          acc[i] = k == first ? _mm512_setzero_ps() : _mm512_load_ps(sums[i] + j);
        for (int64_t r = 0; r < own; ++r) {
          if (j % PANEL == 0) Ahead(w, k / each + r + DEEP, n + j);
          const __m512i codes = Bytes16<BITS>(w, bytes + r * w.N + j, mask);
          for (int c = 0; c < each; ++c) {
            const __m512 value = Numbers<BITS>(codes, c * BITS, table);
            for (int i = 0; i < MT; ++i)
              acc[i] = _mm512_fmadd_ps(value, _mm512_set1_ps(a[i][r * each + c]), acc[i]);
          }
        }
        for (int i = 0; i < MT; ++i) _mm512_store_ps(sums[i] + j, acc[i]);
      }
    }
    for (int64_t j = 0; j < blocks; ++j) {
      const int64_t own = std::min(PANEL, count - j * PANEL);
      w.scale.Read(g, n + j * PANEL, own, scale);
      Zeros(w, g, n + j * PANEL, own, zero);
      for (int i = 0; i < MT; ++i)
        for (int64_t c = 0; c < own; ++c)
          total[i * stride + j * PANEL + c] +=
              (sums[i][j * PANEL + c] - zero[c] * x_sum[i]) * scale[c];
    }
  }
}

template <int BITS>
void FloatFew(ffi::ThreadPool& pool, const float* x, const Weight& w, int64_t M, float* y) {
  const Parts p(w, pool.num_threads(), SPAN / M);
  std::vector<float> total(p.parts * M * p.stride, 0.f);
  auto rows = M == 1 ? FloatRows<BITS, 1> : M == 2 ? FloatRows<BITS, 2>
                     : M == 3 ? FloatRows<BITS, 3> : FloatRows<BITS, 4>;
  Parallel(pool, p.parts * p.spans, [&](int64_t i) {
    const int64_t k = i / p.spans, n = i % p.spans * p.span;
    rows(x, w, k * p.part, std::min(w.K, (k + 1) * p.part), n, std::min(p.span, w.N - n), p.stride,
         total.data() + k * M * p.stride + n);
  });
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < w.N; ++n) {
      float all = 0;
      for (int64_t k = 0; k < p.parts; ++k) all += total[(k * M + m) * p.stride + n];
      y[m * w.N + n] = all;
    }
}

// Rows [first, last) of one group as floats [rows PANEL].
template <int BITS>
AVX512 void Floats512(const Weight& w, int64_t first, int64_t last, int64_t n, const float* scale,
                      const float* zero, float* out) {
  constexpr int64_t each = 8 / BITS;
  const __m512 table = BITS == 8 ? _mm512_setzero_ps() : _mm512_loadu_ps(w.table);
  for (int64_t k = first; k < last; k += each)
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t left = w.N - n - 16 * j;
      const __mmask16 mask = left >= 16 ? 0xFFFF : left <= 0 ? 0 : (1u << left) - 1;
      const __m512i bytes = Bytes16<BITS>(w, w.data + k / each * w.N + n + 16 * j, mask);
      for (int c = 0; c < each; ++c) {
        const __m512 value = _mm512_sub_ps(Numbers<BITS>(bytes, c * BITS, table),
                                           _mm512_load_ps(zero + 16 * j));
        _mm512_storeu_ps(out + (k - first + c) * PANEL + 16 * j,
                         _mm512_mul_ps(value, _mm512_load_ps(scale + 16 * j)));
      }
    }
}

template <int MT>
AVX512 void FloatTile(const float* a, int64_t stride, const float* b, int64_t depth, float* total) {
  __m512 acc[MT][4];
  for (int i = 0; i < MT; ++i)
    for (int j = 0; j < 4; ++j) acc[i][j] = _mm512_loadu_ps(total + i * PANEL + 16 * j);
  for (int64_t k = 0; k < depth; ++k, b += PANEL) {
    __m512 w[4];
    for (int j = 0; j < 4; ++j) w[j] = _mm512_loadu_ps(b + 16 * j);
    for (int i = 0; i < MT; ++i) {
      const __m512 x = _mm512_set1_ps(a[i * stride + k]);
      for (int j = 0; j < 4; ++j) acc[i][j] = _mm512_fmadd_ps(w[j], x, acc[i][j]);
    }
  }
  for (int i = 0; i < MT; ++i)
    for (int j = 0; j < 4; ++j) _mm512_storeu_ps(total + i * PANEL + 16 * j, acc[i][j]);
}

template <int BITS>
AVX512 void FloatPanel512(const float* x, const Weight& w, int64_t M, int64_t n, float* y) {
  constexpr int64_t depth = 128;
  const int64_t count = std::min(PANEL, w.N - n);
  static thread_local std::vector<float> b, total;
  b.resize((depth + 8) * PANEL);
  alignas(64) float scale[PANEL], zero[PANEL];
  for (int64_t m0 = 0; m0 < M; m0 += ROWS) {
    const int64_t m1 = std::min(M, m0 + ROWS);
    total.assign((m1 - m0) * PANEL, 0.f);
    for (int64_t g = 0; g < w.groups(); ++g) {
      const int64_t end = std::min(w.K, (g + 1) * w.group);
      w.scale.Read(g, n, count, scale);
      Zeros(w, g, n, count, zero);
      for (int64_t first = g * w.group; first < end; first += depth) {
        const int64_t last = std::min(end, first + depth);
        Floats512<BITS>(w, first, last, n, scale, zero, b.data());
        auto tile = [&](auto size, int64_t m) {
          FloatTile<decltype(size)::value>(x + m * w.K + first, w.K, b.data(), last - first,
                                           total.data() + (m - m0) * PANEL);
        };
        Tiled(m0, m1, tile);
      }
    }
    for (int64_t m = m0; m < m1; ++m)
      std::copy_n(total.data() + (m - m0) * PANEL, count, y + m * w.N + n);
  }
}

#endif  // x86_64

// Matrix e of a call's weights; zero and table may be null.
Weight Matrix(int64_t e, const ffi::AnyBuffer& values, const ffi::AnyBuffer& scale, int64_t K,
              int64_t group, int64_t bits, const uint8_t* zero, const float* table) {
  const auto ws = values.dimensions(), ss = scale.dimensions();
  const int64_t scales = e * ss[1] * ss[2];
  const char* first = static_cast<const char*>(scale.untyped_data());
  return {static_cast<const uint8_t*>(values.untyped_data()) + e * ws[1] * ws[2], K, ws[2], group,
          bits, values.element_type() == ffi::DataType::S8,
          {first + scales * static_cast<int64_t>(ffi::ByteWidth(scale.element_type())),
           scale.element_type(), ss[2]},
          zero ? zero + scales : nullptr, table};
}

// The level of instructions that a call uses: the best, or at most what it asks for.
int Used(int64_t asked) { return asked < 0 ? Level() : std::min<int>(asked, Level()); }

ffi::Error Integer(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer values,
                   ffi::AnyBuffer scale, ffi::Buffer<ffi::F32> fixed,
                   ffi::ResultBuffer<ffi::F32> y, int64_t bits, int64_t group, int64_t level) {
  const int64_t M = x.dimensions()[1], K = x.dimensions()[2], N = values.dimensions()[2];
  const int use = Used(level);
  for (int64_t e = 0; e < x.dimensions()[0]; ++e) {
    const Weight w = Matrix(e, values, scale, K, group, bits, nullptr, nullptr);
    Rounded r;
    r.stride = (K + 15) / 8 * 8, r.G = w.groups();
    r.codes.assign(M * r.stride, 0), r.sums.resize(M * r.G), r.steps.resize(M);
    const float* in = x.typed_data() + e * M * K;
    const float* one = fixed.element_count() ? fixed.typed_data() + e : nullptr;
    float* out = y->typed_data() + e * M * N;
    const int64_t part = 16;                          // rows that a thread rounds at a time
    auto round = [&](int64_t p) {
      for (int64_t m = p * part; m < std::min(M, (p + 1) * part); ++m)
        RoundOne(in, w, one, use, m, r);
    };
    if (M <= part) round(0); else Parallel(pool, (M + part - 1) / part, round);
#if defined(__x86_64__)
    if (use == 2 && M == 1) {
      IntegerOne(pool, r, w, out);
      continue;
    }
    if (use == 2) {
      const int64_t all = (N + PANEL - 1) / PANEL, most = Panels(M);
      Parallel(pool, (all + most - 1) / most, [&](int64_t p) {
        IntegerPanels512(r, w, M, p * most * PANEL, std::min(most, all - p * most), out);
      });
      continue;
    }
    auto panel = use == 1 ? IntegerPanel2 : IntegerPanel0;
#else
    auto panel = IntegerPanel0;
#endif
    Parallel(pool, (N + PANEL - 1) / PANEL, [&](int64_t p) { panel(r, w, M, p * PANEL, out); });
  }
  return ffi::Error::Success();
}

ffi::Error Floating(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer values,
                    ffi::AnyBuffer scale, ffi::Buffer<ffi::U8> zero, ffi::Buffer<ffi::F32> table,
                    ffi::ResultBuffer<ffi::F32> y, int64_t bits, int64_t group, int64_t level) {
  const int64_t M = x.dimensions()[1], K = x.dimensions()[2], N = values.dimensions()[2];
  const int use = Used(level);
  for (int64_t e = 0; e < x.dimensions()[0]; ++e) {
    const Weight w = Matrix(e, values, scale, K, group, bits,
                            zero.element_count() ? zero.typed_data() : nullptr,
                            table.typed_data());
    const float* in = x.typed_data() + e * M * K;
    float* out = y->typed_data() + e * M * N;
#if defined(__x86_64__)
    if (use == 2 && M <= 4) {
      (bits == 8 ? FloatFew<8> : bits == 4 ? FloatFew<4> : FloatFew<2>)(pool, in, w, M, out);
      continue;
    }
    auto best = bits == 8 ? FloatPanel512<8> : bits == 4 ? FloatPanel512<4> : FloatPanel512<2>;
    auto panel = use == 2 ? best : use == 1 ? FloatPanel2 : FloatPanel0;
#else
    auto panel = FloatPanel0;
#endif
    Parallel(pool, (N + PANEL - 1) / PANEL, [&](int64_t p) { panel(in, w, M, p * PANEL, out); });
  }
  return ffi::Error::Success();
}

}  // namespace

extern "C" int LeanLevel() { return Level(); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    LeanInteger, Integer,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>()
        .Attr<int64_t>("bits").Attr<int64_t>("group").Attr<int64_t>("level"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    LeanFloating, Floating,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::U8>>().Arg<ffi::Buffer<ffi::F32>>()
        .Ret<ffi::Buffer<ffi::F32>>()
        .Attr<int64_t>("bits").Attr<int64_t>("group").Attr<int64_t>("level"));
