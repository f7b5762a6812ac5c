#include "isa.h"

#include <omp.h>

#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#include <string_view>

#include <algorithm>

#include "../check.h"
#include "kernels.h"

namespace ceg {
namespace {

#define CEG_ENTRY(kernel, Args) .kernel = level::kernel##_kernel,

struct Level {
  Kernels kernels;
  bool (*supported)();
};

#ifdef CEG_HAS_amx
// The tile registers are 8 KiB a thread, which Linux saves only for processes that have asked for
// it once; it refuses where it, or the hypervisor, does not save them.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_
  static const bool granted = [] {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kAmxBf16) &&
           (edx & kAmxTile) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
#else
  return false;
#endif
}
#endif

// __builtin_cpu_supports also asks the operating system whether it saves the registers. Each
// level is a superset of the one before.
#define CEG_TABLE(level_)                                           \
  [] {                                                              \
    namespace level = level_;                                       \
    return Kernels{.isa = #level_, CEG_FOR_EACH_KERNEL(CEG_ENTRY)}; \
  }()

const std::vector<Level>& levels() {
  static const std::vector<Level> table = {
      {CEG_TABLE(portable), [] { return true; }},
#ifdef CEG_HAS_avx2
      {CEG_TABLE(avx2),
       [] {
         return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                __builtin_cpu_supports("f16c");
       }},
#endif
#ifdef CEG_HAS_avx512
      {CEG_TABLE(avx512),
       [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
       }},
#endif
#ifdef CEG_HAS_avx512bf16
      {CEG_TABLE(avx512bf16),
       [] { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512dq"); }},
#endif
#ifdef CEG_HAS_amx
      {CEG_TABLE(amx),
       [] {
         return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512dq") &&
                may_use_tiles();
       }},
#endif
  };
  return table;
}

// Measured on a Sapphire Rapids Xeon: vdpbf16ps does 66-73 GFLOP/s a core, fp32 FMA 137-152, so
// bf16 attention is twice as fast widened. On Zen 5 the dot product has 1.8 times the rate of the
// FMA. The tiles of AMX do 2200 on the same Xeon, and attention is three times as fast as widened.
bool slower_than_the_level_below(const Level& level) {
#if defined(__x86_64__)
  return std::string_view(level.kernels.isa) == "avx512bf16" && __builtin_cpu_is("intel");
#else
  (void)level;
  return false;
#endif
}

const Kernels& best() {
  static const Kernels* chosen = [] {
    const Kernels* last = nullptr;
    for (const Level& level : levels()) {
      if (level.supported() && !slower_than_the_level_below(level)) last = &level.kernels;
    }
    return last;
  }();
  return *chosen;
}

std::string joined(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

}  // namespace

const Kernels& kernels(const std::string& isa) {
  if (isa.empty()) return best();
  for (const Level& level : levels()) {
    if (isa == level.kernels.isa && level.supported()) return level.kernels;
  }
  fail("isa must be one of ", joined(available_isa_levels()), " on this machine, got ", isa);
}

std::vector<std::string> built_isa_levels() {
  std::vector<std::string> names;
  for (const Level& level : levels()) names.push_back(level.kernels.isa);
  return names;
}

std::vector<std::string> available_isa_levels() {
  std::vector<std::string> names;
  for (const Level& level : levels()) {
    if (level.supported()) names.push_back(level.kernels.isa);
  }
  return names;
}

std::string default_isa_level() { return best().isa; }

int thread_count(int threads) { return threads > 0 ? threads : omp_get_max_threads(); }

int threads_for(const Tensor& t, int threads) {
  constexpr int64_t kBytesPerThread = 32 << 10;
  const int64_t useful = t.numel() * item_size(t.dtype) / kBytesPerThread;
  return static_cast<int>(std::clamp<int64_t>(useful, 1, thread_count(threads)));
}

int64_t cache_bytes() {
  static const int64_t bytes = [] {
    const int64_t l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return l2 > 0 ? l2 : int64_t{1} << 20;
  }();
  return bytes;
}

}  // namespace ceg
