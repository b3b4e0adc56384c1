// Products with weights of few bits for CPUs, called by XLA (kernels/native/__init__.py).
//
// A weight is codes [K N], those of four and two bits packed along K, and scales [G N]; no matrix
// of floats is made of it. It is multiplied in panels of 64 columns: laid out so once before
// (`prepare`), or a block at a time. Four levels of instructions are chosen between at run time:
//   amx.h       tiles; many rows of activations at a time
//   avx512.h    AVX512-VNNI
//   portable.h  C++ that any CPU runs, and the same compiled for AVX2
#include <numeric>

#include "amx.h"
#include "portable.h"
#include "weights.h"

namespace {

using namespace lean;  // NOLINT

enum Levels { PORTABLE, AVX2_ONLY, VNNI, TILES };

int Level() {
#if defined(__x86_64__)
  static const int level = [] {
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
#if defined(LEAN_AMX)
      if (HasAmx()) return TILES;
#endif
      return VNNI;
    }
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? AVX2_ONLY : PORTABLE;
  }();
  return level;
#else
  return PORTABLE;
#endif
}

// The level of instructions that a call uses: the best, or at most what it asks for.
int Used(int64_t asked) { return asked < 0 ? Level() : std::min<int>(asked, Level()); }

// Row m of activations, `codes` and `row` being room for one; `ordered`: every eight codes with the
// even ones first, as weights of four bits are laid out; `tiles`: in tiles.
void RoundOne(const float* x, const Weight& w, const float* fixed, int level, bool ordered,
              bool tiles, int64_t m, int8_t* codes, int8_t* row, Rounded& out) {
  auto round = RoundRow0;
#if defined(__x86_64__)
  if (level >= VNNI) round = RoundRow512;
  else if (level == AVX2_ONLY) round = RoundRow2;
#endif
  out.steps[m] = round(x + m * w.K, w.K, fixed, codes);
  if (level < VNNI) {
    std::copy_n(codes, w.K, out.floats.data() + m * w.K);
    return;
  }
  std::memset(codes + w.K, 0, 8);
  for (int64_t g = 0; g < out.G; ++g) {
    const int8_t* from = codes + g * w.group;
    const int64_t rows = std::min(w.group, w.K - g * w.group);
    int8_t* to = row + g * out.pitch;
    if (!tiles)                                      // whose weights are signed: nothing is taken off
      out.sums[m * out.G + g] = std::accumulate(from, from + rows, 0);
    if (!ordered) {
      std::memcpy(to, from, rows);
      continue;
    }
    for (int64_t k = 0; k < rows; k += 8)
      for (int i = 0; i < 4; ++i) {
        to[k + i] = from[k + 2 * i];
        to[k + 4 + i] = from[k + 2 * i + 1];
      }
  }
  int8_t* all = out.codes.data();
  if (!tiles) {
    std::memcpy(all + m * out.stride, row, out.stride);
    return;
  }
  for (int64_t at = 0; at < out.stride; at += 64)
    std::memcpy(all + m / 16 * 16 * out.stride + at * 16 + m % 16 * 64, row + at, 64);
}

Rounded Round(ffi::ThreadPool& pool, const float* x, const Weight& w, int64_t M,
              const float* fixed, int level) {
  const bool tiles = level == TILES && M > 1, ordered = w.bits == 4 && level >= VNNI;
  Rounded r;
  r.G = w.groups();
  r.pitch = Up(w.group, tiles ? 64 : 8);
  r.stride = r.G * r.pitch;
  r.steps.resize(M);
  if (level < VNNI) r.floats.resize(M * w.K);
  else r.codes.assign(Up(M, 16) * r.stride + 64, 0), r.sums.resize(M * r.G);
  const int64_t part = 16;                            // rows that a thread rounds at a time
  auto round = [&](int64_t p) {
    std::vector<int8_t> codes(w.K + 8), row(r.stride);
    for (int64_t m = p * part; m < std::min(M, (p + 1) * part); ++m)
      RoundOne(x, w, fixed, level, ordered, tiles, m, codes.data(), row.data(), r);
  };
  if (M <= part) round(0); else Parallel(pool, (M + part - 1) / part, round);
  return r;
}

void IntegerProduct(ffi::ThreadPool& pool, const float* x, const Weight& w, int64_t M,
                    const float* fixed, int level, float* y) {
  const Rounded r = Round(pool, x, w, M, fixed, level);
#if defined(__x86_64__)
  if (level >= VNNI && M == 1) {
    if (!w.panels) return IntegerOne(pool, r, w, y);
    auto line = w.bits == 4 ? IntegerLine<4> : IntegerLine<8>;
    return EachPanel(pool, w, [&](int64_t n) { line(r, w, n, y); });
  }
#if defined(LEAN_AMX)
  if (level == TILES) {
    IntegerAmx k{r, w};
    k.operand.rows = Up(M, 16);
    return Shared(pool, k, w, M, y);
  }
#endif
  if (level >= VNNI) {
    IntegerVnni k{r, w};
    return Shared(pool, k, w, M, y);
  }
  auto panel = level == AVX2_ONLY ? IntegerPanel2 : IntegerPanel0;
#else
  auto panel = IntegerPanel0;
#endif
  EachPanel(pool, w, [&](int64_t n) { panel(r, w, M, n, y); });
}

// `parts`: of bfloat16 that the activations have.
void FloatProduct(ffi::ThreadPool& pool, const float* x, const Weight& w, int64_t M, int parts,
                  int level, float* y) {
#if defined(__x86_64__)
  if (w.groups() > 1 && w.group % (4 * w.each())) level = std::min<int>(level, AVX2_ONLY);
  if (level >= VNNI && M <= 4) {
    auto rows = w.bits == 8 ? FloatFew<8> : w.bits == 4 ? FloatFew<4> : FloatFew<2>;
    auto panels = w.bits == 8 ? FloatFewPanels<8> : w.bits == 4 ? FloatFewPanels<4>
                                                                : FloatFewPanels<2>;
    return (w.panels ? panels : rows)(pool, x, w, M, y);
  }
#if defined(LEAN_AMX)
  if (level == TILES) {
    Split s;
    s.pitch = Up(w.group, FloatAmx::UNIT), s.stride = w.groups() * s.pitch, s.rows = Up(M, 16);
    s.parts = parts;
    s.values.assign(parts * s.rows * s.stride, 0);
    auto split = [&](int64_t m) { SplitRow(x + m * w.K, w, m, s); };
    if (M <= 16) for (int64_t m = 0; m < M; ++m) split(m); else Parallel(pool, M, split);
    FloatAmx k(s, w);
    return Shared(pool, k, w, M, y);
  }
#endif
  if (level >= VNNI) {
    FloatFma k{x, w};
    return Shared(pool, k, w, M, y);
  }
  auto panel = level == AVX2_ONLY ? FloatPanel2 : FloatPanel0;
#else
  auto panel = FloatPanel0;
#endif
  EachPanel(pool, w, [&](int64_t n) { panel(x, w, M, n, y); });
}

// Matrix e of a call's weights; zero and table may be null. Values of four axes are panels.
Weight Matrix(int64_t e, const ffi::AnyBuffer& values, const ffi::AnyBuffer& scale, int64_t K,
              int64_t N, int64_t group, int64_t bits, const uint8_t* zero, const float* table) {
  const auto ws = values.dimensions(), ss = scale.dimensions();
  const int64_t scales = e * ss[1] * ss[2];
  const bool panels = ws.size() == 4;
  const char* first = static_cast<const char*>(scale.untyped_data());
  return {static_cast<const uint8_t*>(values.untyped_data()) +
              e * ws[1] * ws[2] * (panels ? ws[3] : 1),
          K, N, group, bits, values.element_type() == ffi::DataType::S8, panels,
          {first + scales * static_cast<int64_t>(ffi::ByteWidth(scale.element_type())),
           scale.element_type(), ss[2]},
          zero ? zero + scales : nullptr, table};
}

ffi::Error Unprepared(const ffi::AnyBuffer& values, int level) {
  if (values.dimensions().size() == 4 && level < VNNI)
    return ffi::Error::InvalidArgument("a weight in panels needs AVX512-VNNI");
  return ffi::Error::Success();
}

// Calls product(matrix, rows of x before its own, how many are its own): as many of each as x [E M
// K] has, or those that `sizes` says of the rows of x [1 M K], which follow each other.
template <class F>
ffi::Error Each(const ffi::Buffer<ffi::F32>& x, const ffi::AnyBuffer& values,
                const ffi::Buffer<ffi::S32>& sizes, F product) {
  const int64_t M = x.dimensions()[1], all = x.dimensions()[0] * M;
  const int64_t ragged = static_cast<int64_t>(sizes.element_count());
  int64_t at = 0;
  for (int64_t e = 0; e < values.dimensions()[0]; ++e) {
    const int64_t rows = ragged ? sizes.typed_data()[e] : M;
    if (rows < 0 || rows > all - at)
      return ffi::Error::InvalidArgument("sizes are more than there are rows");
    if (rows) product(e, at, rows);
    at += rows;
  }
  return ffi::Error::Success();
}

ffi::Error Integer(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer values,
                   ffi::AnyBuffer scale, ffi::Buffer<ffi::F32> fixed, ffi::Buffer<ffi::S32> sizes,
                   ffi::ResultBuffer<ffi::F32> y, int64_t bits, int64_t group, int64_t level) {
  const int64_t K = x.dimensions()[2], N = y->dimensions()[2];
  const int use = Used(level);
  if (auto error = Unprepared(values, use); error.failure()) return error;
  return Each(x, values, sizes, [&](int64_t e, int64_t at, int64_t rows) {
    const Weight w = Matrix(e, values, scale, K, N, group, bits, nullptr, nullptr);
    const float* fixed_step = fixed.element_count() ? fixed.typed_data() + e : nullptr;
    IntegerProduct(pool, x.typed_data() + at * K, w, rows, fixed_step, use,
                   y->typed_data() + at * N);
  });
}

ffi::Error Floating(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer values,
                    ffi::AnyBuffer scale, ffi::Buffer<ffi::U8> zero, ffi::Buffer<ffi::F32> table,
                    ffi::Buffer<ffi::S32> sizes, ffi::ResultBuffer<ffi::F32> y, int64_t bits,
                    int64_t group, int64_t parts, int64_t level) {
  const int64_t K = x.dimensions()[2], N = y->dimensions()[2];
  const int use = Used(level);
  if (auto error = Unprepared(values, use); error.failure()) return error;
  return Each(x, values, sizes, [&](int64_t e, int64_t at, int64_t rows) {
    const Weight w = Matrix(e, values, scale, K, N, group, bits,
                            zero.element_count() ? zero.typed_data() : nullptr,
                            table.typed_data());
    FloatProduct(pool, x.typed_data() + at * K, w, rows, static_cast<int>(parts), use,
                 y->typed_data() + at * N);
  });
}

}  // namespace

extern "C" int LeanLevel() { return Level(); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    LeanInteger, Integer,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::S32>>()
        .Ret<ffi::Buffer<ffi::F32>>()
        .Attr<int64_t>("bits").Attr<int64_t>("group").Attr<int64_t>("level"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    LeanFloating, Floating,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::AnyBuffer>()
        .Arg<ffi::AnyBuffer>().Arg<ffi::Buffer<ffi::U8>>().Arg<ffi::Buffer<ffi::F32>>()
        .Arg<ffi::Buffer<ffi::S32>>().Ret<ffi::Buffer<ffi::F32>>()
        .Attr<int64_t>("bits").Attr<int64_t>("group").Attr<int64_t>("parts")
        .Attr<int64_t>("level"));
