// Why the sm_90a attention kernels cannot run a problem.
#include "attention_sm90_launch.h"

namespace ceg::cuda {
namespace {

struct Named {
  const char* name;
  const TensorOfRows& rows;
};

std::string why_not(const Attention& p, std::initializer_list<Named> mapped) {
  const int width = most(p.head_dim, p.value_dim);
  if (width > kWidestSm90) {
    return "needs head_dim <= " + std::to_string(kWidestSm90) + ", got " + std::to_string(width);
  }
#if !defined(CEG_HAS_SM90A) && !defined(CEG_CUDA_SIM)
  return "needs a build for sm_90a";
#endif
  const int capability = compute_capability();
  if (capability != 90) return "needs sm_90, got sm_" + std::to_string(capability);
  for (const auto& [name, rows] : mapped) {
    if (std::string why = tensor_map_why_not(name, rows); !why.empty()) return why;
  }
  return "";
}

}  // namespace

std::string attention_sm90_why_not(const AttentionFwd& args) {
  const MappedRows rows(args);
  return why_not(args.problem, {{"q", rows.q}, {"k", rows.k}, {"v", rows.v}});
}

std::string attention_sm90_why_not(const AttentionBwd& args) {
  const MappedRows rows(args);
  const TensorOfRows dout = rows_of_dout(args);
  return why_not(args.problem, {{"dout", dout}, {"q", rows.q}, {"k", rows.k}, {"v", rows.v}});
}

}  // namespace ceg::cuda
