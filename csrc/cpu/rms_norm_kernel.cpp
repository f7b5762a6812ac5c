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

template <class S>
void forward(const RmsNormFwdArgs& a) {
  using C = ComputeOf<S>;
  const int64_t rows = a.x.shape[0], dim = a.x.shape[1];
  ColumnScale<C> column_scale(a.weight, dim, a.weight_offset);
  const C* scale = column_scale.data();
  const int64_t ahead = rows_ahead(dim * static_cast<int64_t>(sizeof(S)));
  const bool stream_y = streams(a.y, kStreamAlign<S>);
  const bool stream_sum = a.residual_out && streams(*a.residual_out, kStreamAlign<S>);

#pragma omp parallel num_threads(a.threads)
  {
    const DenormalsOff guard;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const S* x = a.x.ptr<S>() + row * a.x.stride[0];
      const S* residual = row_of<S>(a.residual, row);
      S* y = a.y.ptr<S>() + row * a.y.stride[0];
      S* sum = row_of<S>(a.residual_out, row);
      // The sum is formed again when it is written: the row is in L1 or L2 by
      // then, and a buffer for it would cost the same traffic.
      const auto h = [&](int64_t i, int64_t n) {
        const Vec<C> v = load_n<C>(x + i, n);
        return residual ? v + load_n<C>(residual + i, n) : v;
      };

      // Reduce.
      const C squares = sum_over<C>(dim, [&](int64_t i, int64_t n) {
        const Vec<C> v = h(i, n);
        return v * v;
      });
      const C rstd = C{1} / __builtin_sqrt(squares / static_cast<C>(dim) + static_cast<C>(a.eps));
      a.rstd.ptr<C>()[row * a.rstd.stride[0]] = rstd;

      // Scale and write.
      // A later row is fetched meanwhile, or memory would only be read in the
      // phase before.
      const S* next = x + (row + ahead < rows ? ahead * a.x.stride[0] : 0);
      for_each_vec<C>(dim, [&](int64_t i, int64_t n) {
        prefetch_line(next, i);
        const Vec<C> v = h(i, n);
        put(y + i, v * rstd * load<C>(scale + i), n, stream_y);
        if (sum) put(sum + i, v, n, stream_sum);
      });
    }
    stream_fence();
  }
}

// Rows whose dweight terms meet in registers before they go to memory.
constexpr int kGroup = 4;
// Upper bound of partial sums of dweight. Their number follows from the rows
// alone, never from the threads, so the result has the same bits for any number
// of threads.
constexpr int64_t kMaxPartials = 64;

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

// dx of kRows rows from `first` on; their share of dweight is added to
// `partial`.
template <int kRows, class S, class C>
void backward_rows(const RmsNormBwdArgs& a, int64_t first, const C* scale, bool stream_dx,
                   C* partial) {
  const int64_t dim = a.h.shape[1];
  const S *dy[kRows], *h[kRows], *dh[kRows];
  S* dx[kRows];
  C rstd[kRows], projection[kRows];

  // Memory is read in both phases: the next rows of dy during the first, of h during the second.
  const bool last = first + 2 * kRows > a.h.shape[0];
  const int64_t next_dy = last ? 0 : kRows * a.dy.stride[0];
  const int64_t next_h = last ? 0 : kRows * a.h.stride[0];

  // Reduce: how much of dy points along h.
  for (int r = 0; r < kRows; ++r) {
    dy[r] = a.dy.ptr<S>() + (first + r) * a.dy.stride[0];
    h[r] = a.h.ptr<S>() + (first + r) * a.h.stride[0];
    dh[r] = row_of<S>(a.dh, first + r);
    dx[r] = a.dx.ptr<S>() + (first + r) * a.dx.stride[0];
    const C along = sum_over<C>(dim, [&](int64_t i, int64_t n) {
      prefetch_line(dy[r] + next_dy, i);
      return load_n<C>(dy[r] + i, n) * load<C>(scale + i) * load_n<C>(h[r] + i, n);
    });
    rstd[r] = a.rstd.ptr<C>()[(first + r) * a.rstd.stride[0]];
    projection[r] = along * rstd[r] * rstd[r] * rstd[r] / static_cast<C>(dim);
  }

  // Write.
  constexpr int64_t lanes = kLanes<C>;
  for_each_line<C, S>(dim, [&](int64_t i, auto vectors, int64_t n) {
    constexpr int kVectors = decltype(vectors)::value;
    Vec<C> dw[kVectors] = {};
    for (int r = 0; r < kRows; ++r) {
      for (int u = 0; u < kVectors; ++u) {
        const int64_t j = i + u * lanes;
        prefetch_line(h[r] + next_h, j);
        const Vec<C> dyr = load_n<C>(dy[r] + j, n) * rstd[r], hr = load_n<C>(h[r] + j, n);
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
}

template <class S>
void backward(const RmsNormBwdArgs& a) {
  using C = ComputeOf<S>;
  const int64_t rows = a.h.shape[0], dim = a.h.shape[1];
  ColumnScale<C> column_scale(a.weight, dim, a.weight_offset);
  const bool stream_dx = streams(a.dx, kStreamAlign<S>);
  const int64_t groups = (rows + kGroup - 1) / kGroup;
  const int64_t groups_each = (groups + kMaxPartials - 1) / kMaxPartials;
  const int64_t n_partials = groups ? (groups + groups_each - 1) / groups_each : 0;
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
      const int64_t end = std::min<int64_t>(rows, (p + 1) * groups_each * kGroup);
      int64_t row = p * groups_each * kGroup;
      for (; row + kGroup <= end; row += kGroup) {
        backward_rows<kGroup, S>(a, row, column_scale.data(), stream_dx, partial);
      }
      for (; row < end; ++row) {
        backward_rows<1, S>(a, row, column_scale.data(), stream_dx, partial);
      }
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
