// Tensors in, tensors out: checks what the kernels rely on, takes memory and launches them.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include "moe/routing_cuda.cuh"
#include "moe/routing_cuda.h"
#include "moe/routing_lists.cuh"

namespace pyvlm {
namespace {

using torch::headeronly::ScalarType;

// Puts kernels on torch's current stream of a device.
class Launch {
 public:
  explicit Launch(int device) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&most_bytes_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  }

  template <typename... Parameters, typename... Arguments>
  void operator()(void (*kernel)(Parameters...), int blocks, int threads, size_t bytes,
                  const Arguments&... arguments) const {
    STD_TORCH_CHECK(bytes <= static_cast<size_t>(most_bytes_), "router: so many experts need ", bytes,
                    " bytes of shared memory, and a block of this GPU has ", most_bytes_,
                    "; use backend=\"reference\"");
    if (bytes > 48 * 1024) {
      STD_CUDA_CHECK(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
    }
    kernel<<<blocks, threads, bytes, stream_>>>(arguments...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  cudaStream_t stream_;
  int most_bytes_ = 0;
};

// Calls f with a logit and a probability of the types that the logits' dtype stands for.
template <typename F>
void dispatch(ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float{}, float{});
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16{}, float{});
    case ScalarType::Half:
      return f(torch::headeronly::Half{}, float{});
    case ScalarType::Double:
      return f(double{}, double{});
    default:
      STD_TORCH_CHECK(false, "router: logits must be float32, bfloat16, float16 or float64");
  }
}

StableTensor checked_logits(const StableTensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0,
                  "router: logits must be [tokens, experts] with at least one expert");
  STD_TORCH_CHECK(logits.numel() <= std::numeric_limits<int>::max(), "router: ", logits.numel(),
                  " logits; expected less than 2^31 of them, so that slots can be numbered in 32 bits");
  return torch::stable::contiguous(logits);
}

void check_vector(const char* name, const StableTensor& vector, int64_t size, ScalarType dtype,
                  const StableTensor& logits) {
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == size && vector.scalar_type() == dtype &&
                      vector.is_cuda() && vector.get_device_index() == logits.get_device_index() &&
                      vector.is_contiguous(),
                  "router: ", name, " must be contiguous ", torch::headeronly::toString(dtype), " [", size,
                  "] on the device of the logits");
}

ScalarType weight_type(const StableTensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <typename T>
T* pointer(const StableTensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Memory of a routing, and what the kernels hand to each other in.
struct Memory {
  int tokens, experts;
  StableTensor token, weight, expert_offsets, token_offsets, slot;
  StableTensor bits, prob;

  Memory(const StableTensor& logits, int64_t slots)
      : tokens(static_cast<int>(logits.size(0))), experts(static_cast<int>(logits.size(1))) {
    using torch::stable::new_empty;
    token = new_empty(logits, {slots}, ScalarType::Int);
    weight = new_empty(logits, {slots}, weight_type(logits));
    slot = new_empty(logits, {slots}, ScalarType::Int);
    if (tokens == 0) {  // no kernel runs
      expert_offsets = torch::stable::new_zeros(logits, {experts + 1}, ScalarType::Int);
      token_offsets = torch::stable::new_zeros(logits, {1}, ScalarType::Int);
      return;
    }
    expert_offsets = new_empty(logits, {experts + 1}, ScalarType::Int);
    token_offsets = new_empty(logits, {tokens + 1}, ScalarType::Int);
    const auto ints = static_cast<int64_t>(routing::BitMatrix::ints(tokens, experts));
    bits = new_empty(logits, {ints}, ScalarType::Int);
    prob = new_empty(logits, {experts, tokens}, weight_type(logits));
  }

  template <typename Prob>
  routing::Lists<Prob> lists() const {
    return {pointer<int>(token), pointer<Prob>(weight), pointer<int>(expert_offsets),
            pointer<int>(token_offsets), pointer<int>(slot)};
  }
  routing::BitMatrix bit_matrix() const { return {pointer<int>(bits), tokens, experts}; }
  StableRouting tensors() const { return {weight, token, expert_offsets, token_offsets, slot}; }
};

}  // namespace

StableRouting expert_choice_cuda(const StableTensor& logits, const std::optional<StableTensor>& capacity,
                                 const std::optional<StableTensor>& group_offsets,
                                 std::optional<int64_t> slots) {
  const StableTensor held = checked_logits(logits);
  const int64_t tokens = held.size(0), experts = held.size(1);
  STD_TORCH_CHECK(
      slots.has_value(),
      "expert_choice: a CUDA call needs the number of slots, for it does not wait for the device");
  STD_TORCH_CHECK(*slots >= 0 && *slots <= tokens * experts && *slots % experts == 0,
                  "expert_choice: ", *slots, " slots for ", tokens, " tokens and ", experts,
                  " experts; expected the same number for each expert, at most one a token");
  STD_TORCH_CHECK(capacity.has_value() == group_offsets.has_value(),
                  "expert_choice: capacity and group_offsets are given together or not at all");
  routing::Groups groups{nullptr, nullptr, 1, static_cast<int>(tokens), static_cast<int>(*slots / experts)};
  if (group_offsets.has_value()) {
    const int64_t count = group_offsets->numel() - 1;
    check_vector("capacity", *capacity, count, ScalarType::Long, held);
    check_vector("group_offsets", *group_offsets, count + 1, ScalarType::Long, held);
    STD_TORCH_CHECK(count * experts <= std::numeric_limits<int>::max(), "expert_choice: ", count,
                    " groups are too many");
    groups.capacity_G = pointer<int64_t>(*capacity);
    groups.offsets = pointer<int64_t>(*group_offsets);
    groups.count = static_cast<int>(count);
  }
  const torch::stable::accelerator::DeviceGuard guard(held.get_device_index());
  const Memory memory(held, *slots);
  if (tokens > 0) {
    const Launch launch(held.get_device_index());
    dispatch(held.scalar_type(), [&]<typename Logit, typename Prob>(Logit, Prob) {
      routing::expert_choice(launch, pointer<const Logit>(held), memory.tokens, memory.experts, groups,
                             static_cast<int>(*slots), memory.bit_matrix(), pointer<Prob>(memory.prob),
                             memory.lists<Prob>());
    });
  }
  return memory.tensors();
}

StableRouting token_choice_cuda(const StableTensor& logits, int64_t top_k, std::optional<int64_t> capacity,
                                bool normalize, const std::string&, const std::optional<StableTensor>& bias) {
  const StableTensor held = checked_logits(logits);
  const int64_t tokens = held.size(0), experts = held.size(1);
  STD_TORCH_CHECK(!capacity.has_value(),
                  "token_choice: with a capacity the number of slots depends on the data, which a CUDA call "
                  "does not wait for; use backend=\"reference\"");
  STD_TORCH_CHECK(top_k >= 1 && top_k <= experts, "token_choice: top_k is ", top_k, " of ", experts);
  const torch::stable::accelerator::DeviceGuard guard(held.get_device_index());
  const Memory memory(held, tokens * top_k);
  if (tokens > 0) {
    const Launch launch(held.get_device_index());
    const StableTensor sum = torch::stable::new_empty(held, {tokens}, weight_type(held));
    StableTensor added = held;
    if (bias.has_value()) {
      added = torch::stable::contiguous(torch::stable::to(*bias, weight_type(held)));
      check_vector("bias", added, experts, weight_type(held), held);
    }
    dispatch(held.scalar_type(), [&]<typename Logit, typename Prob>(Logit, Prob) {
      routing::token_choice(launch, pointer<const Logit>(held),
                            bias.has_value() ? pointer<const Prob>(added) : nullptr, memory.tokens,
                            memory.experts, static_cast<int>(top_k), normalize, memory.bit_matrix(),
                            pointer<Prob>(memory.prob), pointer<Prob>(sum), memory.lists<Prob>());
    });
  }
  return memory.tensors();
}

StableTensor routing_backward_cuda(const StableTensor& grad_weight, const StableTensor& logits,
                                   const StableTensor& token, const StableTensor& weight,
                                   const StableTensor& expert_offsets, bool normalize) {
  const StableTensor held = checked_logits(logits);
  const int64_t slots = token.numel(), experts = held.size(1);
  const StableTensor grad = torch::stable::contiguous(torch::stable::to(grad_weight, weight_type(held)));
  check_vector("token", token, slots, ScalarType::Int, held);
  check_vector("weight", weight, slots, weight_type(held), held);
  check_vector("the gradient of weight", grad, slots, weight_type(held), held);
  check_vector("expert_offsets", expert_offsets, experts + 1, ScalarType::Int, held);
  const torch::stable::accelerator::DeviceGuard guard(held.get_device_index());
  StableTensor grad_logits = torch::stable::new_empty(held, {held.size(0), experts});
  if (held.size(0) > 0) {
    const Launch launch(held.get_device_index());
    dispatch(held.scalar_type(), [&]<typename Logit, typename Prob>(Logit, Prob) {
      routing::routing_backward(launch, pointer<const Prob>(grad), pointer<const Logit>(held),
                                pointer<const int>(token), pointer<const Prob>(weight),
                                pointer<const int>(expert_offsets), static_cast<int>(held.size(0)),
                                static_cast<int>(experts), normalize, pointer<Logit>(grad_logits));
    });
  }
  return grad_logits;
}

StableRouting routing_from_choices_cuda(const StableTensor& index, int64_t num_experts,
                                        bool drop_out_of_range) {
  const bool wide = index.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(index.dim() == 2 && num_experts >= 1 && num_experts <= std::numeric_limits<int>::max() &&
                      (wide || index.scalar_type() == ScalarType::Int) &&
                      index.numel() <= std::numeric_limits<int>::max(),
                  "routing_from_choices: index must be int32 or int64 [tokens, choices], less than 2^31 of "
                  "them, of one expert or more");
  STD_TORCH_CHECK(!drop_out_of_range,
                  "routing_from_choices: where choices are dropped the number of slots depends on the data, "
                  "which a CUDA call does not wait for; use backend=\"reference\"");
  using torch::stable::new_empty;
  const torch::stable::accelerator::DeviceGuard guard(index.get_device_index());
  const StableTensor held = torch::stable::contiguous(index);
  const int slots = static_cast<int>(held.numel()), experts = static_cast<int>(num_experts);
  const StableTensor choice = new_empty(held, {slots}, ScalarType::Long),
                     token = new_empty(held, {slots}, ScalarType::Int),
                     slot = new_empty(held, {slots}, ScalarType::Int);
  if (slots == 0) {  // no kernel runs
    return {choice, token, torch::stable::new_zeros(held, {num_experts + 1}, ScalarType::Int),
            torch::stable::new_zeros(held, {held.size(0) + 1}, ScalarType::Int), slot};
  }
  const StableTensor expert_offsets = new_empty(held, {num_experts + 1}, ScalarType::Int),
                     token_offsets = new_empty(held, {held.size(0) + 1}, ScalarType::Int);
  const int chunks = routing::choice_chunks(slots);
  const auto ints = static_cast<int64_t>(routing::ChunkCounts::ints(chunks, experts));
  const StableTensor memory = new_empty(held, {ints}, ScalarType::Int);
  const routing::ChunkCounts counts(pointer<int>(memory), chunks, experts);
  const routing::NumberedLists lists{pointer<int>(token), pointer<int64_t>(choice),
                                     pointer<int>(expert_offsets), pointer<int>(token_offsets),
                                     pointer<int>(slot)};
  const Launch launch(held.get_device_index());
  const auto run = [&](const auto* index_S) {
    routing::routing_from_choices(launch, index_S, slots, static_cast<int>(held.size(1)), experts, counts,
                                  lists);
  };
  if (wide) {
    run(pointer<const int64_t>(held));
  } else {
    run(pointer<const int32_t>(held));
  }
  return {choice, token, expert_offsets, token_offsets, slot};
}

StableRouting merge_routings_cuda(const std::vector<StableTensor>& token,
                                  const std::vector<StableTensor>& expert_offsets,
                                  const std::vector<StableTensor>& rows, int64_t num_tokens) {
  STD_TORCH_CHECK(!token.empty() && expert_offsets.size() == token.size() && rows.size() == token.size(),
                  "merge_routings: got ", token.size(), " lists of tokens, ", expert_offsets.size(),
                  " of offsets and ", rows.size(), " of rows");
  const StableTensor& like = token[0];
  const torch::stable::accelerator::DeviceGuard guard(like.get_device_index());
  const int64_t experts = expert_offsets[0].numel() - 1;
  std::vector<StableTensor> held;  // what the parts point to
  std::vector<routing::Part> parts;
  int64_t slots = 0;
  for (size_t i = 0; i < token.size(); ++i) {
    const StableTensor places = torch::stable::contiguous(torch::stable::to(rows[i], ScalarType::Long));
    const StableTensor tokens = torch::stable::contiguous(token[i]);
    const StableTensor offsets = torch::stable::contiguous(expert_offsets[i]);
    check_vector("token", tokens, tokens.numel(), ScalarType::Int, like);
    check_vector("expert_offsets", offsets, experts + 1, ScalarType::Int, like);
    check_vector("rows", places, places.numel(), ScalarType::Long, like);
    parts.push_back({pointer<const int>(tokens), pointer<const int>(offsets), pointer<const int64_t>(places),
                     static_cast<int>(tokens.numel()), static_cast<int>(places.numel()),
                     static_cast<int>(slots)});
    slots += tokens.numel();
    held.insert(held.end(), {tokens, offsets, places});
  }
  STD_TORCH_CHECK(experts >= 1 && num_tokens >= 0 &&
                      num_tokens * experts <= std::numeric_limits<int>::max() &&
                      slots <= num_tokens * experts,
                  "merge_routings: ", slots, " slots of ", num_tokens, " tokens and ", experts,
                  " experts; expected one expert or more, and less than 2^31 pairs of a token and an expert");
  using torch::stable::new_empty;
  const StableTensor order = new_empty(like, {slots}, ScalarType::Long),
                     merged = new_empty(like, {slots}, ScalarType::Int),
                     slot = new_empty(like, {slots}, ScalarType::Int);
  if (num_tokens == 0) {  // no kernel runs
    return {order, merged, torch::stable::new_zeros(like, {experts + 1}, ScalarType::Int),
            torch::stable::new_zeros(like, {1}, ScalarType::Int), slot};
  }
  const StableTensor offsets = new_empty(like, {experts + 1}, ScalarType::Int),
                     token_offsets = new_empty(like, {num_tokens + 1}, ScalarType::Int),
                     slots_ET = new_empty(like, {experts, num_tokens}, ScalarType::Long);
  const auto ints = static_cast<int64_t>(routing::BitMatrix::ints(num_tokens, experts));
  const StableTensor bits = torch::stable::new_zeros(like, {ints}, ScalarType::Int);
  const routing::BitMatrix matrix(pointer<int>(bits), static_cast<int>(num_tokens),
                                  static_cast<int>(experts));
  routing::merge_routings(
      Launch(like.get_device_index()), parts.data(), static_cast<int>(parts.size()),
      static_cast<int>(num_tokens), static_cast<int>(experts), static_cast<int>(slots), matrix,
      pointer<int64_t>(slots_ET),
      routing::NumberedLists{pointer<int>(merged), pointer<int64_t>(order), pointer<int>(offsets),
                             pointer<int>(token_offsets), pointer<int>(slot)});
  return {order, merged, offsets, token_offsets, slot};
}

}  // namespace pyvlm
