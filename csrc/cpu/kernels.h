// The table that connects launchers (compiled once) with kernels (compiled once per ISA level).
//
// A kernel X takes one struct of arguments that its launcher has already checked:
//   X.h           struct XArgs, declaration of the launcher (namespace ceg)
//   X.cpp         launcher: checks, then kernels(isa).x(args)
//   X_kernel.cpp  namespace ceg::CEG_ISA { void x_kernel(const XArgs&) }
#pragma once

namespace ceg {

#define CEG_FOR_EACH_KERNEL(X)          \
  X(attention_fwd, AttentionFwdArgs)    \
  X(attention_bwd, AttentionBwdArgs)    \
  X(rms_norm_fwd, RmsNormFwdArgs)       \
  X(rms_norm_bwd, RmsNormBwdArgs)       \
  X(rope, RopeArgs)                     \
  X(moe_route, MoeRouteArgs)            \
  X(moe_route_bwd, MoeRouteBwdArgs)     \
  X(moe_dispatch, MoeDispatchArgs)      \
  X(moe_combine, MoeCombineArgs)        \
  X(moe_combine_bwd, MoeCombineBwdArgs) \
  X(roofs_fma, RoofsFmaArgs)            \
  X(roofs_copy, RoofsCopyArgs)

#define CEG_DECLARE(kernel, Args) struct Args;
CEG_FOR_EACH_KERNEL(CEG_DECLARE)
#undef CEG_DECLARE

struct Kernels {
  const char* isa;
#define CEG_DECLARE(kernel, Args) void (*kernel)(const Args&);
  CEG_FOR_EACH_KERNEL(CEG_DECLARE)
#undef CEG_DECLARE
};

#define CEG_DECLARE(kernel, Args) void kernel##_kernel(const Args&);
#define CEG_DECLARE_LEVEL(level)              \
  namespace level {                           \
  CEG_FOR_EACH_KERNEL(CEG_DECLARE)            \
  inline constexpr const char* kIsa = #level; \
  }
CEG_DECLARE_LEVEL(portable)
CEG_DECLARE_LEVEL(avx2)
CEG_DECLARE_LEVEL(avx512)
CEG_DECLARE_LEVEL(avx512bf16)
CEG_DECLARE_LEVEL(amx)
#undef CEG_DECLARE
#undef CEG_DECLARE_LEVEL

}  // namespace ceg
