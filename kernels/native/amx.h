// The products with AMX: tiles of 16 rows of activations and 64 columns of a panel.
//
// Signed bytes are multiplied as they are. Floats are multiplied in bfloat16, of which three hold a
// float32 whole, upper bits first: as many are taken of the activations as their dtype needs, one of
// codes that are integers, three of a table's numbers. What a group's sums are is scaled in float32.
#pragma once
#include "avx512.h"

#if defined(__x86_64__) && defined(__linux__) && \
    (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define LEAN_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

// Written out: what the compilers' own functions for these read and write, GCC 12 does not know.
#define TILE_ZERO(t) asm volatile("tilezero %%tmm" #t ::: "memory")
#define TILE_LOAD(t, from, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #t : : "r"(from), "r"(int64_t{stride}) : "memory")
#define TILE_STORE(t, to, stride) \
  asm volatile("tilestored %%tmm" #t ", (%0,%1,1)" : : "r"(to), "r"(int64_t{stride}) : "memory")
#define TILE_PRODUCT(sum, weight) \
  if (FLOATS) asm volatile("tdpbf16ps %%tmm" #weight ", %%tmm4, %%tmm" #sum ::: "memory"); \
  else asm volatile("tdpbssd %%tmm" #weight ", %%tmm4, %%tmm" #sum ::: "memory")

namespace lean {

// Whether the CPU has it and the kernel of the system grants its registers to this process.
inline bool HasAmx() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned all = 1u << 22 | 1u << 24 | 1u << 25;             // bf16, tiles, int8
  constexpr long request = 0x1023, tile_data = 18;                     // ARCH_REQ_XCOMP_PERM
  return (d & all) == all && syscall(SYS_arch_prctl, request, tile_data) == 0;
}

// Tiles of 64 bytes a row: sums 0 to 3 and activations 4 of `rows` rows, weights 5 to 7 of 16.
inline void Configure(int64_t rows) {
  struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } tiles;
  std::memset(&tiles, 0, sizeof(tiles));
  tiles.palette = 1;
  for (int i = 0; i < 8; ++i) {
    tiles.bytes[i] = 64;
    tiles.rows[i] = static_cast<uint8_t>(i < 5 ? rows : 16);
  }
  asm volatile("ldtilecfg %0" : : "m"(tiles));
}

inline void Release() { asm volatile("tilerelease"); }

// Activations in tiles, `parts` matrices of them [rows / 16, across, 16, 64 bytes].
struct Operand {
  const char* data;
  int64_t across, rows;
  int parts;
  const char* At(int part, int64_t m, int64_t tile) const {
    return data + ((part * rows + m) / 16 * across + tile) * 1024;
  }
};

// Adds the products of rows [m, m + 16) with a laid out block of a panel: parts of it `between`
// bytes apart, of which those products are taken that matter to `most` parts together.
template <bool FLOATS>
AVX512 void AmxTile(const Operand& x, int64_t m, const std::vector<Piece>& pieces,
                    const uint8_t* b, int parts, int64_t between, int most, int rows,
                    const float* scale, int32_t* sums, float* total) {
  constexpr int64_t deep = FLOATS ? 32 : 64, step = 16 * QUAD;
  for (size_t i = 0; i < pieces.size(); ++i) {
    const Piece& p = pieces[i];
    if (p.start) {
      TILE_ZERO(0); TILE_ZERO(1); TILE_ZERO(2); TILE_ZERO(3);
    } else {
      TILE_LOAD(0, sums, QUAD); TILE_LOAD(1, sums + 16, QUAD);
      TILE_LOAD(2, sums + 32, QUAD); TILE_LOAD(3, sums + 48, QUAD);
    }
    for (int part = 0; part < parts; ++part) {
      const uint8_t* w = b + part * between + (p.at - pieces.front().at) / deep * step;
      for (int64_t k = 0; k < p.depth; k += deep, w += step) {
        for (int of = 0; of < x.parts && of + part < most; ++of) {
          TILE_LOAD(4, x.At(of, m, (p.at + k) / deep), 64);
          TILE_LOAD(5, w, QUAD);
          TILE_PRODUCT(0, 5);
          TILE_LOAD(6, w + 64, QUAD);
          TILE_PRODUCT(1, 6);
          TILE_LOAD(7, w + 128, QUAD);
          TILE_PRODUCT(2, 7);
          TILE_LOAD(5, w + 192, QUAD);
          TILE_PRODUCT(3, 5);
        }
      }
    }
    TILE_STORE(0, sums, QUAD); TILE_STORE(1, sums + 16, QUAD);
    TILE_STORE(2, sums + 32, QUAD); TILE_STORE(3, sums + 48, QUAD);
    if (!p.end) continue;
    for (int j = 0; j < 4; ++j) {
      const __m512 by = _mm512_loadu_ps(scale + i * PANEL + 16 * j);
      for (int r = 0; r < rows; ++r) {
        const __m512i sum = _mm512_loadu_si512(sums + r * PANEL + 16 * j);
        const __m512 value = FLOATS ? _mm512_castsi512_ps(sum) : _mm512_cvtepi32_ps(sum);
        float* out = total + r * PANEL + 16 * j;
        _mm512_storeu_ps(out, _mm512_fmadd_ps(value, by, _mm512_loadu_ps(out)));
      }
    }
  }
}

// Codes of a block of a panel as signed bytes, four rows to a lane.
AVX512 inline void Signed(const Weight& w, const uint8_t* tiles, int64_t quads, uint8_t* out) {
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i number = _mm512_broadcast_i32x4(
      _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1));
  for (int64_t q = 0; q < quads; ++q, tiles += QUAD)
    for (int j = 0; j < 4; ++j) {
      const __m512i v = _mm512_loadu_si512(tiles + 64 * j);
      __builtin_prefetch(tiles + AHEAD + 64 * j);
      if (w.bits == 8) {
        _mm512_store_si512(out + q * QUAD + 64 * j, v);
        continue;
      }
      const __m512i high = _mm512_srli_epi16(v, 4);
      _mm512_store_si512(out + 2 * q * QUAD + 64 * j,
                         _mm512_shuffle_epi8(number, _mm512_and_si512(v, low)));
      _mm512_store_si512(out + (2 * q + 1) * QUAD + 64 * j,
                         _mm512_shuffle_epi8(number, _mm512_and_si512(high, low)));
    }
}

struct IntegerAmx {
  const Rounded& x;
  const Weight& w;
  static constexpr int64_t UNIT = 64;                  // positions of a group are a multiple of it
  int64_t size = DEPTH * PANEL;
  std::vector<std::vector<Piece>> blocks = Blocks(w, x.pitch, DEPTH);
  Operand operand = {reinterpret_cast<const char*>(x.codes.data()), x.stride / 64, 0, 1};
  // Panels of bytes are what the tiles read, where none of its rows is in two of them.
  bool direct = w.bits == 8 && w.panels && w.group % UNIT == 0 && w.K % UNIT == 0;

  static void Begin(int64_t M) { Configure(std::min<int64_t>(M, 16)); }
  static void End() { Release(); }
  float Step(int64_t m) const { return x.steps[m]; }

  const uint8_t* Lay(const uint8_t* tiles, const std::vector<Piece>& pieces, const float*,
                     const float*, uint8_t* b) const {
    return direct ? tiles : Bytes(w, tiles, pieces, Signed, b);
  }

  void Sum(int64_t m0, int64_t end, const std::vector<Piece>& pieces, const uint8_t* b,
           const float* scale, int32_t* sums, float* total) const {
    for (int64_t m = m0; m < end; m += 16)
      AmxTile<false>(operand, m, pieces, b, 1, 0, 1, std::min<int64_t>(16, end - m), scale,
                     sums + (m - m0) * PANEL, total + (m - m0) * PANEL);
  }
};

// ---------------------------------------------------------------- floats in parts of bfloat16

// Upper, middle and lower eight significant bits. What is not finite is in the upper part alone.
struct Parts3 { __m512i part[3]; };

AVX512 INLINE Parts3 InParts(__m512 value) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  const __mmask16 nan = _mm512_fpclass_ps_mask(value, 0x81);
  const __mmask16 finite = ~_mm512_fpclass_ps_mask(value, 0x81 | 0x18);
  __m512i h = _mm512_and_si512(_mm512_castps_si512(value), upper);
  const __m512 rest = _mm512_maskz_sub_ps(finite, value, _mm512_castsi512_ps(h));
  const __m512i m = _mm512_and_si512(_mm512_castps_si512(rest), upper);
  const __m512 l = _mm512_sub_ps(rest, _mm512_castsi512_ps(m));
  h = _mm512_mask_or_epi32(h, nan, h, _mm512_set1_epi32(0x00400000));
  return {{h, m, _mm512_castps_si512(l)}};
}

// Activations in bfloat16, `parts` matrices [rows / 16, stride / 32, 16, 32]. Two rows of a pair of
// the weight are beside each other, as `Pairs` lays them out: rows t and t + quad / 2 of the `quad`
// rows of a quad.
struct Split {
  Array<uint16_t> values;
  int64_t pitch, stride, rows;
  int parts;
};

AVX512 inline void SplitRow(const float* x, const Weight& w, int64_t m, Split& out) {
  const int64_t quad = 4 * w.each();
  alignas(64) int32_t from[16];
  for (int i = 0; i < 16; ++i)
    from[i] = static_cast<int32_t>(i / quad * quad + i % quad / 2 + i % 2 * quad / 2);
  const __m512i order = _mm512_load_si512(from);
  for (int64_t g = 0; g < w.groups(); ++g) {
    const int64_t rows = std::min(w.group, w.K - g * w.group);
    for (int64_t k = 0; k < rows; k += 16) {
      const __mmask16 mask = rows - k >= 16 ? 0xFFFF : (1u << (rows - k)) - 1;
      const __m512 value = _mm512_maskz_loadu_ps(mask, x + g * w.group + k);
      const Parts3 p = InParts(_mm512_permutexvar_ps(order, value));
      const int64_t at = g * out.pitch + k;
      for (int i = 0; i < out.parts; ++i)
        _mm256_storeu_si256(
            reinterpret_cast<__m256i*>(out.values.data() + i * out.rows * out.stride +
                                       m / 16 * 16 * out.stride + at / 32 * 512 + m % 16 * 32 +
                                       at % 32),
            _mm512_cvtepi32_epi16(_mm512_srli_epi32(p.part[i], 16)));
    }
  }
}

// Codes of a block of a panel as pairs of bfloat16, 16 columns' in 64 bytes: numbers of `table`, by
// the five lowest bits of code - zero point, or of the code alone.
template <int BITS, bool ZERO>
AVX512 void Pairs(const Weight& w, const uint8_t* tiles, int64_t quads, __m512i table,
                  const float* zero, uint8_t* out) {
  constexpr int pairs = 16 / BITS;
  const __m512i mask = _mm512_set1_epi16((1 << BITS) - 1);
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  __m512i less[4];
  for (int j = 0; ZERO && j < 4; ++j) {
    const __m512i one = _mm512_cvtps_epi32(_mm512_loadu_ps(zero + 16 * j));
    less[j] = _mm512_or_si512(one, _mm512_slli_epi32(one, 16));
  }
  for (int64_t q = 0; q < quads; ++q, tiles += QUAD)
    for (int j = 0; j < 4; ++j) {
      const __m512i v = _mm512_loadu_si512(tiles + 64 * j);
      __builtin_prefetch(tiles + AHEAD + 64 * j);
      for (int t = 0; t < pairs; ++t) {
        __m512i codes = _mm512_srli_epi16(v, t * BITS);
        if (BITS == 8 && w.is_signed) {
          codes = _mm512_srai_epi16(t ? v : _mm512_slli_epi16(v, 8), 8);
        } else if (BITS == 8 || ZERO) {
          codes = _mm512_and_si512(codes, mask);
        }
        if (ZERO) codes = _mm512_sub_epi16(codes, less[j]);
        if (BITS == 8) {
          const __m512i even = _mm512_srai_epi32(_mm512_slli_epi32(codes, 16), 16);
          const __m512i odd = _mm512_srai_epi32(codes, 16);
          codes = _mm512_or_si512(
              _mm512_srli_epi32(_mm512_castps_si512(_mm512_cvtepi32_ps(even)), 16),
              _mm512_and_si512(_mm512_castps_si512(_mm512_cvtepi32_ps(odd)), upper));
        } else {
          codes = _mm512_permutexvar_epi16(codes, table);
        }
        _mm512_store_si512(out + (q * pairs + t) * QUAD + 64 * j, codes);
      }
    }
}

struct FloatAmx {
  static constexpr int64_t UNIT = 32, MOST = 256;      // positions, a multiple of; laid out at a time
  const Split& x;
  const Weight& w;
  int parts;                                           // of the weight
  alignas(64) uint16_t tables[3][32];
  int64_t size, between;
  std::vector<std::vector<Piece>> blocks;
  Operand operand;

  FloatAmx(const Split& x, const Weight& w) : x(x), w(w) {
    parts = 1;
    for (int i = 0; i < 32; ++i) {
      // With a zero point codes are the numbers, and differences of them have five bits.
      const float value = w.zero ? static_cast<float>(i < 16 ? i : i - 32) : w.table[i % 16];
      float rest = w.bits == 8 ? 0 : value;
      for (int p = 0; p < 3; ++p) {
        uint32_t bits;
        std::memcpy(&bits, &rest, 4);
        tables[p][i] = static_cast<uint16_t>(bits >> 16);
        if (p && rest != 0) parts = 3;
        rest -= Scale::Bits(bits & 0xFFFF0000u);
      }
    }
    const int64_t most = parts == 1 ? MOST : MOST / 2;
    blocks = Blocks(w, x.pitch, most);
    between = most * PANEL * 2;
    size = parts * between;
    operand = {reinterpret_cast<const char*>(x.values.data()), x.stride / 32, x.rows, x.parts};
  }

  static void Begin(int64_t M) { Configure(std::min<int64_t>(M, 16)); }
  static void End() { Release(); }
  static float Step(int64_t) { return 1; }

  AVX512 const uint8_t* Lay(const uint8_t* tiles, const std::vector<Piece>& pieces, const float*,
                            const float* zero, uint8_t* b) const {
    const int64_t quad = 4 * w.each(), first = pieces.front().first;
    auto lay = w.zero ? (w.bits == 8 ? Pairs<8, true> : w.bits == 4 ? Pairs<4, true>
                                                                    : Pairs<2, true>)
                      : (w.bits == 8 ? Pairs<8, false> : w.bits == 4 ? Pairs<4, false>
                                                                     : Pairs<2, false>);
    for (int part = 0; part < parts; ++part)
      for (size_t i = 0; i < pieces.size(); ++i) {
        const Piece& p = pieces[i];
        const int64_t quads = (p.rows + quad - 1) / quad, filled = quads * quad * PANEL * 2;
        uint8_t* out = b + part * between + (p.at - pieces.front().at) * PANEL * 2;
        lay(w, tiles + (p.first - first) / quad * QUAD, quads, _mm512_loadu_si512(tables[part]),
            zero + i * PANEL, out);
        std::memset(out + filled, 0, Up(p.depth, UNIT) * PANEL * 2 - filled);
      }
    return b;
  }

  void Sum(int64_t m0, int64_t end, const std::vector<Piece>& pieces, const uint8_t* b,
           const float* scale, int32_t* sums, float* total) const {
    for (int64_t m = m0; m < end; m += 16)
      AmxTile<true>(operand, m, pieces, b, parts, between, std::max(parts, x.parts),
                    std::min<int64_t>(16, end - m), scale, sums + (m - m0) * PANEL,
                    total + (m - m0) * PANEL);
  }
};

}  // namespace lean
#endif
