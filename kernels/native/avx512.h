// The products with AVX512-VNNI.
//
// What is multiplied in integers lies four rows to a lane, as the instruction vpdpbusd wants them.
// Weights are the unsigned side of it (code + 128, or + 8 of four bits), so that what has to be
// taken off is a multiple of the sum of a row's activations.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>

#include "portable.h"

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma")))

namespace lean {

constexpr int64_t DEPTH = 512;    // rows of a panel that are laid out at a time
constexpr int64_t DEEP = 16;      // rows of bytes that one row of activations meets at a time
constexpr int64_t SPAN = 4096;    // columns whose sums stay in the nearest cache
constexpr int64_t ROWS = 256;     // of activations, whose sums stay in the cache
constexpr int64_t AHEAD = 4096;   // bytes of a panel that are asked for before their use

AVX512 inline float RoundRow512(const float* x, int64_t K, const float* fixed, int8_t* out) {
  return RoundRow(x, K, fixed, out);
}

// ---------------------------------------------------------------- rows of bytes, few activations

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
    const int8_t* codes = x.codes.data() + g * x.pitch;
    for (int64_t k = first; k < last; k += deep) {
      const int64_t own = std::min(DEEP / 4, (last - k + quad - 1) / quad);
      for (int64_t j = 0; j < blocks; ++j) {
        int32_t* sum = sums + j * PANEL;
        const __mmask64 mask = Mask(count - j * PANEL);
        __m512i acc[4];
        for (int i = 0; i < 4; ++i)
          acc[i] = k == first ? _mm512_setzero_si512() : _mm512_load_si512(sum + 16 * i);
        for (int64_t q = 0; q < own; ++q) {
          const int8_t* a = codes + k - g * w.group + q * quad;
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

inline void IntegerOne(ffi::ThreadPool& pool, const Rounded& x, const Weight& w, float* y) {
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

// ---------------------------------------------------------------- panels

// One row of activations times a panel of codes of four or eight bits.
template <int BITS>
AVX512 void IntegerLine(const Rounded& x, const Weight& w, int64_t n, float* y) {
  const uint8_t* b = w.data + n / PANEL * w.quads() * QUAD;
  const __m512i sign = _mm512_set1_epi8(-128);
  alignas(64) float scale[PANEL];
  __m512 total[4];
  for (int j = 0; j < 4; ++j) total[j] = _mm512_setzero_ps();
  for (int64_t g = 0; g < w.groups(); ++g) {
    const int64_t rows = std::min(w.group, w.K - g * w.group), quad = 4 * w.each();
    const int8_t* a = x.codes.data() + g * x.pitch;
    __m512i even[4], odd[4];
    for (int j = 0; j < 4; ++j) even[j] = odd[j] = _mm512_setzero_si512();
    w.scale.Ahead(g + 2 < w.groups() ? g + 2 : g, n);
    for (int64_t q = 0; q < (rows + quad - 1) / quad; ++q, a += quad, b += QUAD) {
      const __m512i x0 = Broadcast(a), x1 = Broadcast(a + 4);
      for (int j = 0; j < 4; ++j) {
        __builtin_prefetch(b + AHEAD + 64 * j);
        const __m512i v = _mm512_loadu_si512(b + 64 * j);
        if (BITS == 8) {
          even[j] = Dot(even[j], _mm512_xor_si512(v, sign), x0);
        } else {
          even[j] = Dot(even[j], Low(v), x0);
          odd[j] = Dot(odd[j], High(v), x1);
        }
      }
    }
    w.scale.Read(g, n, w.count(n), scale);
    const __m512i off = _mm512_set1_epi32(x.sums[g] * (BITS == 4 ? 8 : 128));
    for (int j = 0; j < 4; ++j)
      total[j] = _mm512_fmadd_ps(
          _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_add_epi32(even[j], odd[j]), off)),
          _mm512_load_ps(scale + 16 * j), total[j]);
  }
  for (int j = 0; j < 4; ++j) _mm512_store_ps(scale + 16 * j, total[j]);
  for (int64_t i = 0; i < w.count(n); ++i) y[n + i] = scale[i] * x.steps[0];
}

// The bare numbers of code `c` of byte `r` of each of 16 columns' four.
template <int BITS>
AVX512 INLINE __m512 Column(const Weight& w, __m512i v, int r, int c, __m512 table) {
  if (BITS < 8) return Numbers<BITS>(v, 8 * r + c * BITS, table);
  const __m512i top = _mm512_slli_epi32(v, 24 - 8 * r);
  return _mm512_cvtepi32_ps(w.is_signed ? _mm512_srai_epi32(top, 24) : _mm512_srli_epi32(top, 24));
}

// MT rows of floats times a panel: sums of a group's products with the bare numbers, then scales.
// x: [MT stride], zeros past the last row of the weight; x_sums: [MT G].
template <int BITS, int MT>
AVX512 void FloatLines(const float* x, int64_t stride, const float* x_sums, const Weight& w,
                       int64_t n, float* y) {
  constexpr int64_t each = 8 / BITS, quad = 4 * each;
  const uint8_t* b = w.data + n / PANEL * w.quads() * QUAD;
  const __m512 table = BITS == 8 ? _mm512_setzero_ps() : _mm512_loadu_ps(w.table);
  alignas(64) float scale[PANEL], zero[PANEL], total[MT][PANEL] = {};
  for (int64_t g = 0; g < w.groups(); ++g) {
    const int64_t rows = std::min(w.group, w.K - g * w.group);
    const float* a = x + g * w.group;
    __m512 acc[MT][4];
    for (int i = 0; i < MT; ++i)
      for (int j = 0; j < 4; ++j) acc[i][j] = _mm512_setzero_ps();
    w.scale.Ahead(g + 2 < w.groups() ? g + 2 : g, n);
    for (int64_t q = 0; q < (rows + quad - 1) / quad; ++q, a += quad, b += QUAD)
      for (int j = 0; j < 4; ++j) {
        const __m512i v = _mm512_loadu_si512(b + 64 * j);
        __builtin_prefetch(b + AHEAD + 64 * j);
        for (int r = 0; r < 4; ++r)
          for (int c = 0; c < each; ++c) {
            const __m512 value = Column<BITS>(w, v, r, c, table);
            for (int i = 0; i < MT; ++i)
              acc[i][j] = _mm512_fmadd_ps(value, _mm512_set1_ps(a[i * stride + r * each + c]),
                                          acc[i][j]);
          }
      }
    w.scale.Read(g, n, w.count(n), scale);
    Zeros(w, g, n, w.count(n), zero);
    for (int i = 0; i < MT; ++i) {
      const __m512 less = _mm512_set1_ps(x_sums[i * w.groups() + g]);
      for (int j = 0; j < 4; ++j) {
        const __m512 value = _mm512_fnmadd_ps(_mm512_load_ps(zero + 16 * j), less, acc[i][j]);
        _mm512_store_ps(total[i] + 16 * j, _mm512_fmadd_ps(
            value, _mm512_load_ps(scale + 16 * j), _mm512_load_ps(total[i] + 16 * j)));
      }
    }
  }
  for (int i = 0; i < MT; ++i) std::copy_n(total[i], w.count(n), y + i * w.N + n);
}

template <int BITS>
void FloatFewPanels(ffi::ThreadPool& pool, const float* x, const Weight& w, int64_t M, float* y) {
  const int64_t stride = w.quads() * 4 * w.each(), G = w.groups();
  Array<float> filled(M * stride, 0.f), sums(M * G, 0.f);
  for (int64_t m = 0; m < M; ++m) {
    std::copy_n(x + m * w.K, w.K, filled.data() + m * stride);
    for (int64_t k = 0; k < w.K && w.zero; ++k) sums[m * G + k / w.group] += x[m * w.K + k];
  }
  auto lines = M == 1 ? FloatLines<BITS, 1> : M == 2 ? FloatLines<BITS, 2>
                      : M == 3 ? FloatLines<BITS, 3> : FloatLines<BITS, 4>;
  EachPanel(pool, w, [&](int64_t n) { lines(filled.data(), stride, sums.data(), w, n, y); });
}

// `quads` from the first of panels from column n on, of a weight that lies in rows: [panels quads
// QUAD]. All panels of four rows are read before the next rows: memory gives long pieces faster.
AVX512 inline void Retile(const Weight& w, int64_t first, int64_t quads, int64_t n, int64_t panels,
                          uint8_t* out) {
  const int64_t rows = w.byte_rows();
  for (int64_t q = 0; q < quads; ++q)
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t row = 4 * (first + q), at = n + p * PANEL;
      const __mmask64 mask = Mask(w.N - at);
      __m512i r[4];
      for (int i = 0; i < 4; ++i) r[i] = Row(w, row + i, at, mask, rows);
      const Four u = InOrder(Interleaved(r[0], r[1], r[2], r[3]));
      for (int i = 0; i < 4; ++i)
        _mm512_storeu_si512(out + (p * quads + q) * QUAD + 64 * i, u.v[i]);
    }
}

// Rows [first, first + rows) of the weight, of one group; `depth` of them as they are laid out, at
// position `at` of a row of activations. Whether the group's sums start and end with them.
struct Piece {
  int64_t group, first, rows, at, depth;
  bool start, end;
};

// The pieces of a weight that are laid out at a time: as many groups as `most` positions have, or a
// part of one. A group has `pitch` positions.
inline std::vector<std::vector<Piece>> Blocks(const Weight& w, int64_t pitch, int64_t most) {
  std::vector<std::vector<Piece>> blocks;
  int64_t filled = most;
  for (int64_t g = 0; g < w.groups(); ++g) {
    const int64_t rows = std::min(w.group, w.K - g * w.group);
    for (int64_t k = 0; k < rows; k += most) {
      const int64_t depth = std::min(pitch - k, most);
      if (filled + depth > most) {
        blocks.emplace_back();
        filled = 0;
      }
      filled += depth;
      blocks.back().push_back({g, g * w.group + k, std::min(rows - k, most), g * pitch + k, depth,
                               k == 0, k + most >= rows});
    }
  }
  return blocks;
}

// y = the product of M rows of activations with panels from column n on, by kernel `k`, which has
//   blocks, size                how the weight is shared out, and the bytes of a block's layout
//   Lay(tiles, pieces, scale, zero, b)   lays out a block of a panel; gives where it then is
//   Sum(m, end, pieces, b, scale, sums, total)   adds products of rows [m, end) with it
//   Step(m)                     what a row of the result is multiplied by
template <class K>
AVX512 void Panels(K& k, const Weight& w, int64_t M, int64_t n, int64_t panels, float* y) {
  static thread_local Array<uint8_t> bytes, laid;
  static thread_local Array<int32_t> sums;
  static thread_local Array<float> total, scale, zero;
  laid.resize(k.size);
  const int64_t quad = 4 * w.each();
  for (int64_t m = 0; m < M; m += ROWS) {
    const int64_t end = std::min(M, m + ROWS), size = Up(end - m, 16) * PANEL;
    sums.resize(panels * size);
    total.assign(panels * size, 0.f);
    for (const auto& pieces : k.blocks) {
      const int64_t first = pieces.front().first / quad;
      const int64_t quads = (pieces.back().first + pieces.back().rows + quad - 1) / quad - first;
      if (!w.panels) {
        bytes.resize(panels * quads * QUAD);
        Retile(w, first, quads, n, panels, bytes.data());
      }
      scale.resize(pieces.size() * PANEL);
      zero.resize(pieces.size() * PANEL);
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t at = n + p * PANEL;
        for (size_t i = 0; i < pieces.size(); ++i) {
          w.scale.Read(pieces[i].group, at, w.count(at), scale.data() + i * PANEL);
          if (w.zero) Zeros(w, pieces[i].group, at, w.count(at), zero.data() + i * PANEL);
        }
        const uint8_t* tiles = w.panels ? w.data + (at / PANEL * w.quads() + first) * QUAD
                                        : bytes.data() + p * quads * QUAD;
        const uint8_t* from = k.Lay(tiles, pieces, scale.data(), zero.data(), laid.data());
        k.Sum(m, end, pieces, from, scale.data(), sums.data() + p * size, total.data() + p * size);
      }
    }
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t r = m; r < end; ++r) {
        const int64_t at = n + p * PANEL, count = w.count(at);
        const float* row = total.data() + p * size + (r - m) * PANEL;
        const float step = k.Step(r);
        for (int64_t i = 0; i < count; ++i) y[r * w.N + at + i] = row[i] * step;
      }
  }
}

// How many panels a thread takes at a time: rows of bytes are read in long pieces; of many rows of
// activations, what is read of them serves several panels.
inline int64_t PanelsAtOnce(const Weight& w, int64_t M) {
  return M > 64 ? 4 : w.panels ? 1 : 8;
}

// Products of M rows of activations, a thread some panels at a time.
template <class K>
void Shared(ffi::ThreadPool& pool, K& k, const Weight& w, int64_t M, float* y) {
  const int64_t all = (w.N + PANEL - 1) / PANEL, most = PanelsAtOnce(w, M);
  Parallel(pool, (all + most - 1) / most, [&](int64_t p) {
    k.Begin(M);
    Panels(k, w, M, p * most * PANEL, std::min(most, all - p * most), y);
    k.End();
  });
}

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

// ---------------------------------------------------------------- integers by panels

// Codes of a block of a panel as unsigned bytes, four rows to a lane.
AVX512 inline void Unsigned(const Weight& w, const uint8_t* tiles, int64_t quads, uint8_t* out) {
  for (int64_t q = 0; q < quads; ++q, tiles += QUAD)
    for (int j = 0; j < 4; ++j) {
      const __m512i v = _mm512_loadu_si512(tiles + 64 * j);
      __builtin_prefetch(tiles + AHEAD + 64 * j);
      if (w.bits == 8) {
        _mm512_store_si512(out + q * QUAD + 64 * j, _mm512_xor_si512(v, _mm512_set1_epi8(-128)));
      } else {
        _mm512_store_si512(out + 2 * q * QUAD + 64 * j, Low(v));
        _mm512_store_si512(out + (2 * q + 1) * QUAD + 64 * j, High(v));
      }
    }
}

// Lays out a block of a panel as bytes, piece by piece, by `lay`: Unsigned, or Signed of amx.h.
template <class F>
const uint8_t* Bytes(const Weight& w, const uint8_t* tiles, const std::vector<Piece>& pieces, F lay,
                     uint8_t* b) {
  const int64_t quad = 4 * w.each(), first = pieces.front().first;
  for (const Piece& p : pieces)
    lay(w, tiles + (p.first - first) / quad * QUAD, (p.rows + quad - 1) / quad,
        b + (p.at - pieces.front().at) * PANEL);
  return b;
}

// Sums of MT rows of activations with a piece of a panel, `quads` of four rows deep.
template <int MT>
AVX512 void IntegerTile(const int8_t* a, int64_t stride, const uint8_t* b, int64_t quads,
                        bool start, bool end, const int32_t* row_sums, int64_t G, int32_t offset,
                        const float* scale, int32_t* sums, float* total) {
  __m512i acc[MT][4];
  for (int i = 0; i < MT; ++i)
    for (int j = 0; j < 4; ++j)
      acc[i][j] = start ? _mm512_setzero_si512() : _mm512_loadu_si512(sums + i * PANEL + 16 * j);
  for (int64_t q = 0; q < quads; ++q, b += QUAD) {
    __m512i w[4];
    for (int j = 0; j < 4; ++j) w[j] = _mm512_load_si512(b + 64 * j);
    for (int i = 0; i < MT; ++i) {
      const __m512i x = Broadcast(a + i * stride + 4 * q);
      for (int j = 0; j < 4; ++j) acc[i][j] = Dot(acc[i][j], w[j], x);
    }
  }
  for (int i = 0; i < MT; ++i) {
    const __m512i off = _mm512_set1_epi32(end ? row_sums[i * G] * offset : 0);
    for (int j = 0; j < 4; ++j) {
      if (!end) {
        _mm512_storeu_si512(sums + i * PANEL + 16 * j, acc[i][j]);
        continue;
      }
      float* out = total + i * PANEL + 16 * j;
      _mm512_storeu_ps(out, _mm512_fmadd_ps(
          _mm512_cvtepi32_ps(_mm512_sub_epi32(acc[i][j], off)), _mm512_loadu_ps(scale + 16 * j),
          _mm512_loadu_ps(out)));
    }
  }
}

struct IntegerVnni {
  const Rounded& x;
  const Weight& w;
  int64_t size = DEPTH * PANEL;
  std::vector<std::vector<Piece>> blocks = Blocks(w, x.pitch, DEPTH);

  static void Begin(int64_t) {}
  static void End() {}
  float Step(int64_t m) const { return x.steps[m]; }

  const uint8_t* Lay(const uint8_t* tiles, const std::vector<Piece>& pieces, const float*,
                     const float*, uint8_t* b) const {
    return Bytes(w, tiles, pieces, Unsigned, b);
  }

  void Sum(int64_t m0, int64_t end, const std::vector<Piece>& pieces, const uint8_t* b,
           const float* scale, int32_t* sums, float* total) const {
    const int64_t quad = 4 * w.each();
    Tiled(m0, end, [&](auto rows, int64_t m) {
      for (size_t i = 0; i < pieces.size(); ++i) {
        const Piece& p = pieces[i];
        IntegerTile<decltype(rows)::value>(
            x.codes.data() + m * x.stride + p.at, x.stride,
            b + (p.at - pieces.front().at) * PANEL, (p.rows + quad - 1) / quad * w.each(), p.start,
            p.end, x.sums.data() + m * x.G + p.group, x.G, w.bits == 4 ? 8 : 128,
            scale + i * PANEL, sums + (m - m0) * PANEL, total + (m - m0) * PANEL);
      }
    });
  }
};

// ---------------------------------------------------------------- floats by panels

// Rows of a block as floats [rows PANEL], their scales in them.
template <int BITS>
AVX512 void Floats512(const Weight& w, const uint8_t* tiles, int64_t quads, const float* scale,
                      const float* zero, float* out) {
  constexpr int64_t each = 8 / BITS;
  const __m512 table = BITS == 8 ? _mm512_setzero_ps() : _mm512_loadu_ps(w.table);
  for (int64_t q = 0; q < quads; ++q, tiles += QUAD)
    for (int j = 0; j < 4; ++j) {
      const __m512i v = _mm512_loadu_si512(tiles + 64 * j);
      __builtin_prefetch(tiles + AHEAD + 64 * j);
      const __m512 by = _mm512_loadu_ps(scale + 16 * j);
      const __m512 less = w.zero ? _mm512_loadu_ps(zero + 16 * j) : _mm512_setzero_ps();
      for (int r = 0; r < 4; ++r)
        for (int c = 0; c < each; ++c)
          _mm512_store_ps(out + ((q * 4 + r) * each + c) * PANEL + 16 * j, _mm512_mul_ps(
              _mm512_sub_ps(Column<BITS>(w, v, r, c, table), less), by));
    }
}

template <int MT>
AVX512 void FloatTile(const float* a, int64_t stride, const float* b, int64_t depth, float* total) {
  __m512 acc[MT][4];
  for (int i = 0; i < MT; ++i)
    for (int j = 0; j < 4; ++j) acc[i][j] = _mm512_loadu_ps(total + i * PANEL + 16 * j);
  for (int64_t k = 0; k < depth; ++k, b += PANEL) {
    __m512 w[4];
    for (int j = 0; j < 4; ++j) w[j] = _mm512_load_ps(b + 16 * j);
    for (int i = 0; i < MT; ++i) {
      const __m512 x = _mm512_set1_ps(a[i * stride + k]);
      for (int j = 0; j < 4; ++j) acc[i][j] = _mm512_fmadd_ps(w[j], x, acc[i][j]);
    }
  }
  for (int i = 0; i < MT; ++i)
    for (int j = 0; j < 4; ++j) _mm512_storeu_ps(total + i * PANEL + 16 * j, acc[i][j]);
}

struct FloatFma {
  static constexpr int64_t MOST = 128;                 // rows that are laid out at a time
  const float* x;
  const Weight& w;
  int64_t size = MOST * PANEL * 4;
  std::vector<std::vector<Piece>> blocks = Blocks(w, w.group, MOST);

  static void Begin(int64_t) {}
  static void End() {}
  static float Step(int64_t) { return 1; }

  const uint8_t* Lay(const uint8_t* tiles, const std::vector<Piece>& pieces, const float* scale,
                     const float* zero, uint8_t* b) const {
    const int64_t quad = 4 * w.each(), first = pieces.front().first;
    auto floats = w.bits == 8 ? Floats512<8> : w.bits == 4 ? Floats512<4> : Floats512<2>;
    for (size_t i = 0; i < pieces.size(); ++i)
      floats(w, tiles + (pieces[i].first - first) / quad * QUAD, (pieces[i].rows + quad - 1) / quad,
             scale + i * PANEL, zero + i * PANEL,
             reinterpret_cast<float*>(b) + (pieces[i].first - first) * PANEL);
    return b;
  }

  void Sum(int64_t m0, int64_t end, const std::vector<Piece>& pieces, const uint8_t* b,
           const float*, int32_t*, float* total) const {
    const int64_t first = pieces.front().first;
    const int64_t depth = pieces.back().first + pieces.back().rows - first;
    Tiled(m0, end, [&](auto rows, int64_t m) {
      FloatTile<decltype(rows)::value>(x + m * w.K + first, w.K, reinterpret_cast<const float*>(b),
                                       depth, total + (m - m0) * PANEL);
    });
  }
};

}  // namespace lean
#endif  // __x86_64__
