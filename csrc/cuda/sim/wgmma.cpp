#include "../wgmma.h"

#include <cstring>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "block.h"

namespace ceg::sim {
namespace {

constexpr int kM = 64, kK = 16, kMostN = 256;

struct Product {
  WgmmaPart of_thread[kWarpgroup];
  int arrived = 0;
};

// Accumulators of a thread that are under way: what they will hold, and how often.
struct Held {
  std::vector<float> values;
  int products = 0;
};

struct Warpgroup {
  std::deque<Product> products;  // those that are not computed, in order
  size_t computed = 0;
  std::map<float*, Held> held;
};
using Warpgroups = std::map<unsigned, Warpgroup>;

struct Thread {
  size_t issued = 0;
  std::deque<size_t> groups;  // `issued` at each commit
  bool fenced = false;
};

Warpgroup& warpgroup() { return block_state<Warpgroups>()[threadIdx.x / kWarpgroup]; }

bool alike(const WgmmaPart& x, const WgmmaPart& y) {
  return x.n == y.n && x.a == y.a && !x.a_registers == !y.a_registers && x.b == y.b &&
         x.a_is_dense_in_mn == y.a_is_dense_in_mn && x.b_is_dense_in_mn == y.b_is_dense_in_mn &&
         x.accumulate == y.accumulate && x.is_bf16 == y.is_bf16;
}

float item(uint16_t bits, bool is_bf16) {
  return is_bf16 ? __bfloat162float({bits}) : __half2float({bits});
}

float shared_item(uint64_t descriptor, Major major, int mn, int k, bool is_bf16) {
  const uint32_t at = operand_address(descriptor, major, mn, k);
  if (at + 2 > dynamic_shared_bytes()) fail("wgmma: an operand lies beyond shared memory");
  uint16_t bits;
  std::memcpy(&bits, static_cast<const char*>(dynamic_shared_memory()) + at, sizeof(bits));
  return item(bits, is_bf16);
}

void read_a(const Product& product, double (&a)[kM][kK]) {
  const WgmmaPart& first = product.of_thread[0];
  if (!first.a_registers) {
    const Major major = first.a_is_dense_in_mn ? Major::mn : Major::k;
    for (int row = 0; row < kM; ++row) {
      for (int k = 0; k < kK; ++k) {
        a[row][k] = shared_item(first.a, major, row, k, first.is_bf16);
      }
    }
    return;
  }
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = product.of_thread[thread].a_registers[i];
      for (int half = 0; half < 2; ++half) {
        const Position p = mma_a_position(thread % kWarp, i, half);
        const auto bits = static_cast<uint16_t>(half ? pair >> 16 : pair);
        a[thread / kWarp * 16 + p.row][p.column] = item(bits, first.is_bf16);
      }
    }
  }
}

void read_b(const WgmmaPart& part, double (&b)[kK][kMostN]) {
  const Major major = part.b_is_dense_in_mn ? Major::mn : Major::k;
  for (int k = 0; k < kK; ++k) {
    for (int n = 0; n < part.n; ++n) b[k][n] = shared_item(part.b, major, n, k, part.is_bf16);
  }
}

void give_back(Warpgroup& group, float* c) {
  const auto found = group.held.find(c);
  Held& held = found->second;
  if (--held.products) return;
  for (size_t i = 0; i < held.values.size(); ++i) {
    if (__float_as_uint(c[i]) != 0xffffffff) {
      fail("wgmma: accumulators were written between issue and wait_group");
    }
  }
  std::memcpy(c, held.values.data(), held.values.size() * sizeof(float));
  group.held.erase(found);
}

// The manual leaves the order and the rounding of the sum open: here it is rounded once.
void compute(Warpgroup& group) {
  const Product product = group.products.front();
  group.products.pop_front();
  ++group.computed;
  static double a[kM][kK], b[kK][kMostN], sum[kM][kMostN];
  const WgmmaPart& part = product.of_thread[0];
  read_a(product, a);
  read_b(part, b);
  for (int row = 0; row < kM; ++row) {
    double (&to)[kMostN] = sum[row];
    for (int n = 0; n < part.n; ++n) to[n] = 0;
    for (int k = 0; k < kK; ++k) {
      const double factor = a[row][k];
      for (int n = 0; n < part.n; ++n) to[n] += factor * b[k][n];
    }
  }
  for (int thread = 0; thread < kWarpgroup; ++thread) {
    float* const c = product.of_thread[thread].c;
    std::vector<float>& values = group.held.at(c).values;
    for (int n = 0; n < part.n / 8; ++n) {
      for (int i = 0; i < 4; ++i) {
        const Position p = mma_c_position(thread % kWarp, i);
        float& value = values[4 * n + i];
        const double before = part.accumulate ? value : 0;
        value = static_cast<float>(before + sum[thread / kWarp * 16 + p.row][8 * n + p.column]);
      }
    }
    give_back(group, c);
  }
}

bool front_is_complete(const Warpgroup& group) {
  return !group.products.empty() && group.products.front().arrived == kWarpgroup;
}

}  // namespace

void wgmma_issue(const WgmmaPart& mine) {
  Thread& self = thread_state<Thread>();
  if (!self.fenced) fail("wgmma.mma_async: needs a wgmma.fence before it");
  Warpgroup& group = warpgroup();
  while (group.computed + group.products.size() <= self.issued) group.products.emplace_back();
  Product& product = group.products[self.issued++ - group.computed];
  product.of_thread[threadIdx.x % kWarpgroup] = mine;
  for (const WgmmaPart& other : product.of_thread) {
    if (other.c && !alike(mine, other)) {
      fail("wgmma.mma_async: threads of a warpgroup must agree on the product");
    }
  }
  ++product.arrived;
  Held& held = group.held[mine.c];
  if (held.products++ == 0) {
    held.values.assign(mine.c, mine.c + mine.n / 2);
    std::memset(mine.c, 0xff, held.values.size() * sizeof(float));
  }
  if (device().order != Order::reverse) return;
  while (front_is_complete(group)) compute(group);
}

void wgmma_fence() { thread_state<Thread>().fenced = true; }

void wgmma_commit() {
  Thread& self = thread_state<Thread>();
  self.groups.push_back(self.issued);
}

void wgmma_wait(int groups) {
  Thread& self = thread_state<Thread>();
  self.fenced = false;
  size_t until = 0;
  for (; self.groups.size() > static_cast<size_t>(groups); self.groups.pop_front()) {
    until = self.groups.front();
  }
  Warpgroup& group = warpgroup();
  wait_until("wgmma.wait_group", [&] {
    if (group.computed < until && front_is_complete(group) && last_moment()) {
      while (group.computed < until && front_is_complete(group)) compute(group);
    }
    return group.computed >= until;
  });
}

}  // namespace ceg::sim
