#include <algorithm>
#include <type_traits>

#include "rms_norm.h"
#include "rows.h"

namespace ceg::CEG_ISA {
namespace {

// weight + offset in compute type, ones without a weight; padded to whole
// vectors.
template <class C>
class ColumnScale {
 public:
  ColumnScale(const std::optional<Tensor>& weight, int64_t dim, double offset)
      : scale_(dim + kLanes<C>) {
    const C* w = weight ? weight->ptr<C>() : nullptr;
    for (int64_t i = 0; i < dim; ++i) {
      scale_.data()[i] = w ? static_cast<C>(w[i] + offset) : C{1};
    }
    for (int64_t i = dim; i < dim + kLanes<C>; ++i) scale_.data()[i] = 0;
  }
  const C* data() { return scale_.data(); }

 private:
  Scratch<C> scale_;
};

template <class S>
S* row_of(const std::optional<Tensor>& t, int64_t row) {
  return t ? t->ptr<S>() + row * t->stride[0] : nullptr;
}

// A row of h = x + residual. The sum is formed wherever it is needed: a buffer for it would cost
// the same traffic.
template <class S>
struct InputRow {
  const S *x, *residual;

  InputRow(const RmsNormFwdArgs& a, int64_t row)
      : x(a.x.ptr<S>() + row * a.x.stride[0]), residual(row_of<S>(a.residual, row)) {}

  Vec<ComputeOf<S>> load(int64_t i, int64_t n) const {
    const Vec<ComputeOf<S>> v = load_n<ComputeOf<S>>(x + i, n);
    return residual ? v + load_n<ComputeOf<S>>(residual + i, n) : v;
  }
};

// Rows [first, last). One loop writes a row and sums the squares of the next: in loops of their own
// memory would only be read in the one and only be written in the other.
template <class S, class C>
void forward_rows(const RmsNormFwdArgs& a, int64_t first, int64_t last, const C* scale) {
  if (first >= last) return;
  const int64_t dim = a.x.shape[1];
  const int64_t ahead = std::max<int64_t>(2, rows_ahead(dim * static_cast<int64_t>(sizeof(S))));
  const bool stream_y = streams(a.y, kStreamAlign<S>);
  const bool stream_sum = a.residual_out && streams(*a.residual_out, kStreamAlign<S>);
  InputRow<S> now(a, first);
  C squares = sum_over<C>(dim, [&](int64_t i, int64_t n) {
    const Vec<C> h = now.load(i, n);
    return h * h;
  });
  for (int64_t row = first; row < last; ++row) {
    const InputRow<S> next(a, row + 1 < last ? row + 1 : row);
    const InputRow<S> later(a, row + ahead < last ? row + ahead : row);
    const C rstd = C{1} / __builtin_sqrt(squares / static_cast<C>(dim) + static_cast<C>(a.eps));
    a.rstd.ptr<C>()[row * a.rstd.stride[0]] = rstd;
    S* y = a.y.ptr<S>() + row * a.y.stride[0];
    S* sum = row_of<S>(a.residual_out, row);
    squares = sum_over<C>(dim, [&](int64_t i, int64_t n) {
      prefetch_line(later.x, i);
      const Vec<C> h = now.load(i, n), next_h = next.load(i, n);
      put(y + i, h * rstd * load<C>(scale + i), n, stream_y);
      if (sum) put(sum + i, h, n, stream_sum);
      return next_h * next_h;
    });
    now = next;
  }
}

template <class S>
void forward(const RmsNormFwdArgs& a) {
  const int64_t rows = a.x.shape[0];
  ColumnScale<ComputeOf<S>> scale(a.weight, a.x.shape[1], a.weight_offset);
  const int64_t each = (rows + a.threads - 1) / a.threads;

#pragma omp parallel num_threads(a.threads)
  {
    const DenormalsOff guard;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.threads; ++t) {
      forward_rows<S>(a, t * each, std::min(rows, (t + 1) * each), scale.data());
    }
    stream_fence();
  }
}

// Rows of a partial sum of dweight at least, and partial sums at most. Their number follows from
// the rows alone, never from the threads, so the result has the same bits for any number of
// threads.
constexpr int64_t kLeastRows = 16;
constexpr int64_t kMaxPartials = 64;
// Above as many columns two rows go together: their terms of dweight meet in registers, where the
// partial sum would not stay in L1 from row to row.
constexpr int64_t kShortRow = 2048;

template <class C>
void add_partials(const RmsNormBwdArgs& a, C* partials, int64_t n_partials) {
  const int64_t dim = a.h.shape[1];
  // Pairwise, for accuracy.
  for (int64_t step = 1; step < n_partials; step *= 2) {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < n_partials - step; p += 2 * step) {
      for_each_vec<C>(dim, [&](int64_t i, int64_t n) {
        C* into = partials + p * dim + i;
        store_n(into, load_n<C>(into, n) + load_n<C>(into + step * dim, n), n);
      });
    }
  }
#pragma omp for schedule(static)
  for (int64_t i = 0; i < dim; ++i) {
    a.dweight->ptr<C>()[i] = n_partials ? partials[i] : C{0};
  }
}

template <int kRows, class S>
struct GradientRows {
  const S *dy[kRows], *h[kRows];

  GradientRows(const RmsNormBwdArgs& a, int64_t first) {
    for (int r = 0; r < kRows; ++r) {
      dy[r] = a.dy.ptr<S>() + (first + r) * a.dy.stride[0];
      h[r] = a.h.ptr<S>() + (first + r) * a.h.stride[0];
    }
  }
};

// How much of dy * scale points along h, for kRows rows at once. `line(i, vectors, lanes, sums)`
// adds the products of a cache line to sums[row][vector]; as in sum_over the order depends on dim
// alone.
template <int kRows, class S, class C, class F>
void sum_rows(int64_t dim, C (&along)[kRows], F line) {
  constexpr int64_t kBlock = 64 * kLanes<C>;
  Vec<C> total[kRows] = {};
  for (int64_t first = 0; first < dim; first += kBlock) {
    Vec<C> sums[kRows][kTogether<C, S>] = {};
    for_each_line<C, S>(first, std::min(dim, first + kBlock),
                        [&](int64_t i, auto vectors, int64_t n) { line(i, vectors, n, sums); });
    for (int r = 0; r < kRows; ++r) {
      for (const Vec<C>& sum : sums[r]) total[r] += sum;
    }
  }
  for (int r = 0; r < kRows; ++r) along[r] = reduce_add(total[r]);
}

// dx of rows [first, last), kRows at a time; their share of dweight is added to `partial`. One loop
// writes some rows and sums over the next, as in the forward. Those to fetch may be of who comes
// after.
template <int kRows, class S, class C>
void backward_rows(const RmsNormBwdArgs& a, int64_t first, int64_t last, const C* scale,
                   C* partial) {
  if (first >= last) return;
  constexpr int64_t lanes = kLanes<C>;
  using Rows = GradientRows<kRows, S>;
  const int64_t dim = a.h.shape[1];
  const int64_t ahead =
      std::max<int64_t>(2 * kRows, rows_ahead(dim * static_cast<int64_t>(sizeof(S))));
  const bool stream_dx = streams(a.dx, kStreamAlign<S>);
  const auto product = [&](const Rows& rows, int r, int64_t i, int64_t n) {
    return load_n<C>(rows.dy[r] + i, n) * load<C>(scale + i) * load_n<C>(rows.h[r] + i, n);
  };

  Rows now(a, first);
  C along[kRows];
  sum_rows<kRows, S>(dim, along, [&](int64_t i, auto vectors, int64_t n, auto& sums) {
    for (int r = 0; r < kRows; ++r) {
      for (int u = 0; u < vectors; ++u) sums[r][u] += product(now, r, i + u * lanes, n);
    }
  });
  for (int64_t row = first; row < last; row += kRows) {
    const Rows next(a, row + kRows < last ? row + kRows : row);
    const Rows later(a, row + ahead + kRows <= a.h.shape[0] ? row + ahead : row);
    const S* dh[kRows];
    S* dx[kRows];
    C rstd[kRows], projection[kRows];
    for (int r = 0; r < kRows; ++r) {
      dh[r] = row_of<S>(a.dh, row + r);
      dx[r] = a.dx.ptr<S>() + (row + r) * a.dx.stride[0];
      rstd[r] = a.rstd.ptr<C>()[(row + r) * a.rstd.stride[0]];
      projection[r] = along[r] * rstd[r] * rstd[r] * rstd[r] / static_cast<C>(dim);
    }
    sum_rows<kRows, S>(dim, along, [&](int64_t i, auto vectors, int64_t n, auto& sums) {
      constexpr int kVectors = decltype(vectors)::value;
      Vec<C> dw[kVectors] = {};
      for (int r = 0; r < kRows; ++r) {
        for (int u = 0; u < kVectors; ++u) {
          const int64_t j = i + u * lanes;
          prefetch_line(later.dy[r], j);
          prefetch_line(later.h[r], j);
          sums[r][u] += product(next, r, j, n);
          const Vec<C> dyr = load_n<C>(now.dy[r] + j, n) * rstd[r];
          const Vec<C> hr = load_n<C>(now.h[r] + j, n);
          Vec<C> d = dyr * load<C>(scale + j) - hr * projection[r];
          if (a.dh) d += load_n<C>(dh[r] + j, n);
          put(dx[r] + j, d, n, stream_dx);
          dw[u] += dyr * hr;
        }
      }
      for (int u = 0; partial && u < kVectors; ++u) {
        C* into = partial + i + u * lanes;
        store_n(into, load_n<C>(into, n) + dw[u], n);
      }
    });
    now = next;
  }
}

template <class S>
void backward(const RmsNormBwdArgs& a) {
  using C = ComputeOf<S>;
  const int64_t rows = a.h.shape[0], dim = a.h.shape[1];
  ColumnScale<C> column_scale(a.weight, dim, a.weight_offset);
  const int64_t each = std::max(kLeastRows, (rows + kMaxPartials - 1) / kMaxPartials);
  const int64_t n_partials = (rows + each - 1) / each;
  Scratch<C> partials(a.dweight ? n_partials * dim : 0);

#pragma omp parallel num_threads(a.threads)
  {
    const DenormalsOff guard;
#pragma omp for schedule(static)
    for (int64_t p = 0; p < n_partials; ++p) {
      C* partial = a.dweight ? partials.data() + p * dim : nullptr;
      if (partial) {
        for (int64_t i = 0; i < dim; ++i) partial[i] = 0;
      }
      const int64_t first = p * each, last = std::min(rows, first + each);
      const int64_t pairs = dim > kShortRow ? (last - first) / 2 * 2 : 0;
      backward_rows<2, S>(a, first, first + pairs, column_scale.data(), partial);
      backward_rows<1, S>(a, first + pairs, last, column_scale.data(), partial);
    }
    stream_fence();
    if (a.dweight) add_partials<C>(a, partials.data(), n_partials);
  }
}

}  // namespace

void rms_norm_fwd_kernel(const RmsNormFwdArgs& a) {
  with_storage(a.x.dtype, [&](auto s) { forward<decltype(s)>(a); });
}

void rms_norm_bwd_kernel(const RmsNormBwdArgs& a) {
  with_storage(a.h.dtype, [&](auto s) { backward<decltype(s)>(a); });
}

}  // namespace ceg::CEG_ISA
