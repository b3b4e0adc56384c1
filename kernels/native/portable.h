// The products in plain C++, which any CPU runs; AVX2 is the same, compiled for it.
#pragma once
#include "weights.h"

namespace lean {

constexpr int64_t DEEP0 = 64;     // rows of a panel that are floats at a time

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

// Numbers of rows [first, last) and a panel's columns as floats [rows PANEL]: the codes' own, or those
// of the table where it says more. `half`: codes are signed, and this is the least one's size.
INLINE void Numbers0(const Weight& w, int64_t first, int64_t last, int64_t n, const float* table,
                     int half, float* out) {
  const int64_t count = w.count(n);
  for (int64_t k = first; k < last; ++k, out += PANEL) {
    const uint8_t* row = w.data + k / w.each() * w.N + n;
    const int shift = static_cast<int>(k % w.each() * w.bits), mask = (1 << w.bits) - 1;
    if (w.bits == 8 && w.is_signed) {
      for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int8_t>(row[i]);
    } else if (table) {
      for (int64_t i = 0; i < count; ++i) out[i] = table[row[i] >> shift & mask];
    } else {
      for (int64_t i = 0; i < count; ++i)
        out[i] = static_cast<float>(((row[i] >> shift & mask) ^ half) - half);
    }
    for (int64_t i = count; i < PANEL; ++i) out[i] = 0;
  }
}

// The table of a weight and half of its codes, as `Numbers0` takes them: no table of integers.
inline std::pair<const float*, int> TableOf(const Weight& w) {
  if (w.bits == 8 || !w.table) return {nullptr, w.bits == 8 ? 0 : 1 << (w.bits - 1)};
  for (const int half : {0, 1 << (w.bits - 1)}) {
    bool integers = true;
    for (int c = 0; c < 1 << w.bits; ++c) integers &= w.table[c] == static_cast<float>((c ^ half) - half);
    if (integers) return {nullptr, half};
  }
  return {w.table, 0};
}

typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));

// Adds the products of MT rows of activations with `depth` rows of floats [depth PANEL].
template <int MT>
INLINE void Tile0(const float* x, int64_t stride, const float* b, int64_t depth, float* total) {
  for (int64_t j = 0; j < PANEL; j += 16) {
    Eight acc[MT][2];
    Eight* out[MT];
    for (int i = 0; i < MT; ++i) {
      out[i] = reinterpret_cast<Eight*>(total + i * PANEL + j);
      acc[i][0] = out[i][0], acc[i][1] = out[i][1];
    }
    for (int64_t k = 0; k < depth; ++k) {
      const Eight* w = reinterpret_cast<const Eight*>(b + k * PANEL + j);
      const Eight w0 = w[0], w1 = w[1];
      for (int i = 0; i < MT; ++i) {
        const float a = x[i * stride + k];
        acc[i][0] += w0 * a;
        acc[i][1] += w1 * a;
      }
    }
    for (int i = 0; i < MT; ++i) out[i][0] = acc[i][0], out[i][1] = acc[i][1];
  }
}

INLINE void Tiles0(const float* x, int64_t stride, int64_t M, const float* b, int64_t depth,
                   float* total) {
  int64_t m = 0;
  for (; m + 4 <= M; m += 4) Tile0<4>(x + m * stride, stride, b, depth, total + m * PANEL);
  for (; m < M; ++m) Tile0<1>(x + m * stride, stride, b, depth, total + m * PANEL);
}

// Integers are multiplied as floats: sums of EXACT products of bytes are below 2 ** 24, so exact.
INLINE void IntegerPanel(const Rounded& x, const Weight& w, int64_t M, int64_t n, float* y) {
  constexpr int64_t EXACT = 1024;
  static_assert(EXACT * 128 * 127 <= 1 << 24, "");
  const int64_t count = w.count(n);
  const auto [table, half] = TableOf(w);
  Array<float> codes(DEEP0 * PANEL), part(M * PANEL), total(M * PANEL, 0.f);
  Array<int32_t> sums(M * PANEL);
  float scale[PANEL];
  for (int64_t g = 0; g < w.groups(); ++g) {
    const int64_t end = std::min(w.K, (g + 1) * w.group);
    std::fill(sums.begin(), sums.end(), 0);
    for (int64_t at = g * w.group; at < end; at += EXACT) {
      const int64_t until = std::min(end, at + EXACT);
      std::fill(part.begin(), part.end(), 0.f);
      for (int64_t k = at; k < until; k += DEEP0) {
        const int64_t last = std::min(until, k + DEEP0);
        Numbers0(w, k, last, n, table, half, codes.data());
        Tiles0(x.floats.data() + k, w.K, M, codes.data(), last - k, part.data());
      }
      for (int64_t i = 0; i < M * PANEL; ++i) sums[i] += static_cast<int32_t>(part[i]);
    }
    w.scale.Read(g, n, count, scale);
    for (int64_t m = 0; m < M; ++m)
      for (int64_t i = 0; i < PANEL; ++i)
        total[m * PANEL + i] += static_cast<float>(sums[m * PANEL + i]) * scale[i];
  }
  for (int64_t m = 0; m < M; ++m)
    for (int64_t i = 0; i < count; ++i) y[m * w.N + n + i] = total[m * PANEL + i] * x.steps[m];
}

INLINE void FloatPanel(const float* x, const Weight& w, int64_t M, int64_t n, float* y) {
  const int64_t count = w.count(n);
  const auto [table, half] = TableOf(w);
  Array<float> values(DEEP0 * PANEL), total(M * PANEL, 0.f);
  float scale[PANEL], zero[PANEL];
  for (int64_t g = 0; g < w.groups(); ++g) {
    const int64_t end = std::min(w.K, (g + 1) * w.group);
    w.scale.Read(g, n, count, scale);
    Zeros(w, g, n, count, zero);
    for (int64_t k = g * w.group; k < end; k += DEEP0) {
      const int64_t last = std::min(end, k + DEEP0);
      Numbers0(w, k, last, n, table, half, values.data());
      for (int64_t r = 0; r < last - k; ++r)
        for (int64_t i = 0; i < PANEL; ++i)
          values[r * PANEL + i] = (values[r * PANEL + i] - zero[i]) * scale[i];
      Tiles0(x + k, w.K, M, values.data(), last - k, total.data());
    }
  }
  for (int64_t m = 0; m < M; ++m)
    std::copy_n(total.data() + m * PANEL, count, y + m * w.N + n);
}

inline float RoundRow0(const float* x, int64_t K, const float* fixed, int8_t* out) {
  return RoundRow(x, K, fixed, out);
}
inline void IntegerPanel0(const Rounded& x, const Weight& w, int64_t M, int64_t n, float* y) {
  IntegerPanel(x, w, M, n, y);
}
inline void FloatPanel0(const float* x, const Weight& w, int64_t M, int64_t n, float* y) {
  FloatPanel(x, w, M, n, y);
}

#if defined(__x86_64__)
#define AVX2 __attribute__((target("avx2,fma")))
AVX2 inline float RoundRow2(const float* x, int64_t K, const float* fixed, int8_t* out) {
  return RoundRow(x, K, fixed, out);
}
AVX2 inline void IntegerPanel2(const Rounded& x, const Weight& w, int64_t M, int64_t n, float* y) {
  IntegerPanel(x, w, M, n, y);
}
AVX2 inline void FloatPanel2(const float* x, const Weight& w, int64_t M, int64_t n, float* y) {
  FloatPanel(x, w, M, n, y);
}
#endif

}  // namespace lean
