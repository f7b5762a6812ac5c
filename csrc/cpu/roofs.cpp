#include "roofs.h"

#include <omp.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../check.h"
#include "isa.h"
#include "kernels.h"

namespace ceg {
namespace {

// The highest of amount() / seconds over repeated calls: noise only ever slows a roof down.
template <class F>
double best_rate(double seconds, F amount) {
  double best = 0;
  const double end = omp_get_wtime() + seconds;
  do {
    const double start = omp_get_wtime();
    const double done = amount();
    best = std::max(best, done / (omp_get_wtime() - start));
  } while (omp_get_wtime() < end);
  return best;
}

}  // namespace

std::optional<double> fma_flops(const std::string& dtype, int threads, double seconds,
                                const std::string& isa) {
  CEG_CHECK(dtype == "float32" || dtype == "float64" || dtype == "bfloat16" || dtype == "float16",
            "dtype must be float32, float64, bfloat16 or float16, got ", dtype);
  const Kernels& table = kernels(isa);
  if (dtype == "float16") return std::nullopt;
  double flops = 0;
  RoofsFmaArgs args = {.bf16_dot = dtype == "bfloat16",
                       .f64 = dtype == "float64",
                       .threads = thread_count(threads),
                       .rounds = 1,
                       .flops = &flops};
  table.roofs_fma(args);
  if (flops == 0) return std::nullopt;
  // Long enough that starting the threads does not count, short enough to fit between interrupts.
  args.rounds = 200'000;
  return best_rate(seconds, [&] {
    table.roofs_fma(args);
    return flops;
  });
}

double copy_bandwidth(int64_t bytes, int threads, double seconds, const std::string& isa) {
  CEG_CHECK(bytes > 0, "bytes must be positive, got ", bytes);
  // Whole huge pages, where the system has them: in small ones, which lie where they happen to, a
  // copy takes up to three times as long.
  constexpr int64_t kPage = 2 << 20;
  const int64_t padded = (bytes + kPage - 1) / kPage * kPage;
  const auto allocate = [&] {
    std::unique_ptr<char, decltype(&std::free)> memory(
        static_cast<char*>(std::aligned_alloc(kPage, padded)), &std::free);
    CEG_CHECK(memory, "bytes must fit into memory twice, got ", bytes);
#ifdef MADV_HUGEPAGE
    madvise(memory.get(), padded, MADV_HUGEPAGE);
#endif
    std::memset(memory.get(), 1, padded);
    return memory;
  };
  const auto source = allocate(), target = allocate();
  const Kernels& table = kernels(isa);
  const RoofsCopyArgs args = {.source = source.get(),
                              .target = target.get(),
                              .bytes = padded,
                              .threads = thread_count(threads)};
  return best_rate(seconds, [&] {
    table.roofs_copy(args);
    return 2.0 * static_cast<double>(padded);
  });
}

}  // namespace ceg
