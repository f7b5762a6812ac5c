// Runs launchers of the CPU kernels on arguments from a file, for a machine that has no Python for
// its processor: tests/test_aarch64.py writes IN and reads OUT.
//
//   IN:   per call an op's name, then its arguments: 'n' none, 'i' int64, 'f' double, 't' a tensor;
//         every output comes as a tensor too, filled by the caller.
//   OUT:  the bytes of the outputs, one after the other.
#include <cstdio>
#include <cstring>
#include <fstream>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../csrc/cpu/attention.h"
#include "../csrc/cpu/rms_norm.h"
#include "../csrc/cpu/rope.h"

using namespace ceg;

namespace {

class Arguments {
 public:
  explicit Arguments(const char* path) : in_(path, std::ios::binary) {}

  bool more() { return in_.peek() != std::ifstream::traits_type::eof(); }
  std::string name() {
    std::string text(static_cast<size_t>(number()), ' ');
    in_.read(text.data(), static_cast<std::streamsize>(text.size()));
    return text;
  }
  int64_t i() { return tag('i'), number(); }
  double f() {
    tag('f');
    double value;
    in_.read(reinterpret_cast<char*>(&value), sizeof value);
    return value;
  }
  std::optional<Tensor> maybe() {
    if (in_.peek() == 'n') return tag('n'), std::nullopt;
    return t();
  }
  Tensor t() {
    tag('t');
    Tensor t;
    t.dtype = static_cast<DType>(number());
    t.ndim = static_cast<int>(number());
    int64_t items = 1;
    for (int d = 0; d < t.ndim; ++d) t.shape[d] = number();
    for (int d = t.ndim - 1; d >= 0; --d) t.stride[d] = items, items *= t.shape[d];
    const size_t bytes = static_cast<size_t>(items * item_size(t.dtype));
    memory_.emplace_back(bytes + 1);
    t.data = memory_.back().data();
    in_.read(memory_.back().data(), static_cast<std::streamsize>(bytes));
    return t;
  }

 private:
  void tag(char expected) {
    const int got = in_.get();
    if (got != expected) throw std::runtime_error("argument of another kind");
  }
  int64_t number() {
    int64_t value;
    in_.read(reinterpret_cast<char*>(&value), sizeof value);
    return value;
  }

  std::ifstream in_;
  std::vector<std::vector<char>> memory_;
};

constexpr int kThreads = 2;

// What both directions take after their tensors; read in the order of the members.
struct Flags {
  std::optional<Tensor> cu_q, cu_k;
  int64_t max_q, max_k;
  std::optional<Tensor> alibi, sink;
  double scale;
  bool causal;
  int64_t left, right;
  double softcap;

  explicit Flags(Arguments& a)
      : cu_q(a.maybe()),
        cu_k(a.maybe()),
        max_q(a.i()),
        max_k(a.i()),
        alibi(a.maybe()),
        sink(a.maybe()),
        scale(a.f()),
        causal(a.i() != 0),
        left(a.i()),
        right(a.i()),
        softcap(a.f()) {}
};

std::vector<Tensor> attention(Arguments& a) {
  const Tensor q = a.t(), k = a.t(), v = a.t();
  const Flags f(a);
  const Tensor out = a.t(), lse = a.t();
  attention_fwd(q, k, v, f.cu_q, f.cu_k, f.max_q, f.max_k, f.alibi, f.sink, out, lse, f.scale,
                f.causal, f.left, f.right, f.softcap, kThreads, "portable");
  return {out, lse};
}

std::vector<Tensor> attention_backward(Arguments& a) {
  const Tensor dout = a.t();
  const auto dlse = a.maybe();
  const Tensor q = a.t(), k = a.t(), v = a.t(), out = a.t(), lse = a.t();
  const Flags f(a);
  const Tensor dq = a.t(), dk = a.t(), dv = a.t(), dsink = a.t();
  attention_bwd(dout, dlse, q, k, v, out, lse, f.cu_q, f.cu_k, f.max_q, f.max_k, f.alibi, f.sink,
                dq, dk, dv, f.sink ? std::optional(dsink) : std::nullopt, f.scale, f.causal, f.left,
                f.right, f.softcap, kThreads, "portable");
  return {dq, dk, dv, dsink};
}

// (R, D), or (R,) for a row's statistics.
Tensor rows_of(const Tensor& t, int64_t row_items) {
  Tensor flat = t;
  flat.ndim = row_items == 0 ? 1 : 2;
  flat.shape[0] = row_items == 0 ? t.numel() : t.numel() / row_items;
  flat.shape[1] = flat.stride[0] = row_items == 0 ? 1 : row_items;
  flat.stride[1] = 1;
  return flat;
}

std::vector<Tensor> rms_norm(Arguments& a) {
  const Tensor given = a.t();
  const int64_t dim = given.shape[given.ndim - 1];
  const Tensor x = rows_of(given, dim);
  const auto weight = a.maybe();
  auto residual = a.maybe();
  if (residual) residual = rows_of(*residual, dim);
  const double eps = a.f(), offset = a.f();
  const Tensor y = rows_of(a.t(), dim), sum = rows_of(a.t(), dim), rstd = rows_of(a.t(), 0);
  rms_norm_fwd(x, weight, residual, y, residual ? std::optional(sum) : std::nullopt, rstd, eps,
               offset, kThreads, "portable");
  return {y, sum, rstd};
}

std::vector<Tensor> rotate(Arguments& a) {
  const Tensor q = a.t(), k = a.t(), cos = a.t(), sin = a.t();
  const auto positions = a.maybe();
  const int64_t interleaved = a.i(), inverse = a.i();
  const Tensor q_out = a.t(), k_out = a.t();
  rope(q, k, cos, sin, positions, q_out, k_out, interleaved != 0, inverse != 0, kThreads,
       "portable");
  return {q_out, k_out};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::ofstream file(argv[2], std::ios::binary);
  try {
    for (Arguments a(argv[1]); a.more();) {
      const std::string op = a.name();
      const auto outs = op == "attention"            ? attention(a)
                        : op == "attention_backward" ? attention_backward(a)
                        : op == "rms_norm"           ? rms_norm(a)
                                                     : rotate(a);
      for (const Tensor& t : outs) {
        file.write(t.ptr<const char>(), t.numel() * item_size(t.dtype));
      }
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
