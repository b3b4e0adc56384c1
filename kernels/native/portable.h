// The products in plain C++, which any CPU runs; AVX2 is the same, compiled for it.
#pragma once
#include "weights.h"

namespace lean {

constexpr int64_t DEPTH = 512;    // rows of a panel that are laid out at a time

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
  const int64_t count = w.count(n);
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
        const int8_t* row = x.codes.data() + m * x.stride + g * x.pitch + first - g * w.group;
        int32_t* sum = sums.data() + m * PANEL;
        for (int64_t k = 0; k < last - first; ++k) {
          const int32_t a = row[k];
          const int16_t* b = codes.data() + k * PANEL;
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

INLINE void FloatPanel(const float* x, const Weight& w, int64_t M, int64_t n, float* y) {
  const int64_t count = w.count(n);
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
