// The CUDA routers of csrc/moe/routing_cuda.cuh, emulated on host memory, for ctypes. Each function returns
// null, or what went wrong.
#include "emulated_cuda.h"
// after what it needs of CUDA
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <string>

#include "moe/routing_cuda.cuh"
#include "moe/routing_lists.cuh"

namespace pyvlm::routing {
alignas(16) unsigned char dynamic_memory[228 * 1024];
}

namespace {

using namespace pyvlm::routing;

const char* emulate(bool reversed, const auto& run) {
  static std::string problem;
  emulated::reversed = reversed;
  try {
    run();
  } catch (const std::exception& error) {
    problem = error.what();
    return problem.c_str();
  }
  return nullptr;
}

const char* emulate(int dtype, bool reversed, const auto& run) {
  return emulate(reversed, [&] {
    switch (dtype) {
      case 0:
        return run(float{}, float{});
      case 1:
        return run(double{}, double{});
      case 2:
        return run(torch::headeronly::BFloat16{}, float{});
      default:
        return run(torch::headeronly::Half{}, float{});
    }
  });
}

struct Arrays {
  int* token;
  void* weight;
  int *expert_offsets, *token_offsets, *slot;
  int* bits;
  void* prob;

  template <typename Prob>
  Lists<Prob> lists() const {
    return {token, static_cast<Prob*>(weight), expert_offsets, token_offsets, slot};
  }
};

}  // namespace

extern "C" {

int64_t bits_size(int tokens, int experts) { return BitMatrix::ints(tokens, experts); }

const char* expert_choice_on_host(int dtype, bool reversed, const void* logits, int tokens, int experts,
                                  const int64_t* capacity, const int64_t* offsets, int groups, int slots,
                                  const Arrays* out) {
  return emulate(dtype, reversed, [&]<typename Logit, typename Prob>(Logit, Prob) {
    const Groups of_tokens{capacity, offsets, groups, tokens, slots / experts};
    expert_choice(emulated::Launch{dynamic_memory}, static_cast<const Logit*>(logits), tokens, experts,
                  of_tokens, slots, BitMatrix(out->bits, tokens, experts), static_cast<Prob*>(out->prob),
                  out->lists<Prob>());
  });
}

const char* token_choice_on_host(int dtype, bool reversed, const void* logits, const void* bias, int tokens,
                                 int experts, int top_k, bool normalize, void* sums, const Arrays* out) {
  return emulate(dtype, reversed, [&]<typename Logit, typename Prob>(Logit, Prob) {
    token_choice(emulated::Launch{dynamic_memory}, static_cast<const Logit*>(logits),
                 static_cast<const Prob*>(bias), tokens, experts, top_k, normalize,
                 BitMatrix(out->bits, tokens, experts), static_cast<Prob*>(out->prob),
                 static_cast<Prob*>(sums), out->lists<Prob>());
  });
}

const char* routing_backward_on_host(int dtype, bool reversed, const void* grad, const void* logits,
                                     const int* token, const void* weight, const int* expert_offsets,
                                     int tokens, int experts, bool normalize, void* grad_logits) {
  return emulate(dtype, reversed, [&]<typename Logit, typename Prob>(Logit, Prob) {
    routing_backward(emulated::Launch{dynamic_memory}, static_cast<const Prob*>(grad),
                     static_cast<const Logit*>(logits), token, static_cast<const Prob*>(weight),
                     expert_offsets, tokens, experts, normalize, static_cast<Logit*>(grad_logits));
  });
}

int64_t counts_size(int slots, int experts) { return ChunkCounts::ints(choice_chunks(slots), experts); }

const char* routing_from_choices_on_host(bool wide, bool reversed, const void* index, int slots, int top_k,
                                         int experts, int* counts, const NumberedLists* out) {
  return emulate(reversed, [&] {
    const auto run = [&](const auto* index_S) {
      routing_from_choices(emulated::Launch{dynamic_memory}, index_S, slots, top_k, experts,
                           ChunkCounts(counts, choice_chunks(slots), experts), *out);
    };
    return wide ? run(static_cast<const int64_t*>(index)) : run(static_cast<const int32_t*>(index));
  });
}

// `bits` is zero at first.
const char* merge_routings_on_host(bool reversed, const Part* parts, int count, int tokens, int experts,
                                   int slots, const Arrays* out) {
  return emulate(reversed, [&] {
    merge_routings(emulated::Launch{dynamic_memory}, parts, count, tokens, experts, slots,
                   BitMatrix(out->bits, tokens, experts), static_cast<int64_t*>(out->prob),
                   out->lists<int64_t>());
  });
}
}
