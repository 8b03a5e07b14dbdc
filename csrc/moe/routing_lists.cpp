// Slot lists: the one that is sorted by token, the merge of several, and the one of choices made elsewhere.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "common/parallel.h"
#include "moe/routing.h"

namespace pyvlm {

std::tuple<at::Tensor, at::Tensor> sort_by_token(const at::Tensor& token, const at::Tensor& expert_offsets,
                                                 int64_t num_tokens) {
  const int64_t slots = token.size(0), experts = expert_offsets.size(0) - 1;
  at::Tensor token_offsets = at::empty({num_tokens + 1}, at::kInt), slot = at::empty({slots}, at::kInt);
  const int32_t *token_of = token.const_data_ptr<int32_t>(),
                *first = expert_offsets.const_data_ptr<int32_t>();
  int32_t *start = token_offsets.mutable_data_ptr<int32_t>(), *sorted = slot.mutable_data_ptr<int32_t>();

  // A counting sort. Each thread takes a range of tokens, of which every expert has its slots side by side.
  constexpr int64_t kSlotsWorthAThread = 1 << 14;
  const int64_t ranges = std::clamp<int64_t>(slots / kSlotsWorthAThread, 1, at::get_num_threads());
  std::vector<int32_t> slots_of(ranges + 1, 0);
  const auto each_range = [&](const auto& function) {
    at::parallel_for(0, ranges, 1, [&](int64_t range, int64_t end) {
      for (; range < end; ++range) {
        function(range, num_tokens * range / ranges, num_tokens * (range + 1) / ranges);
      }
    });
  };
  const auto each_slot = [&](int64_t begin, int64_t end, const auto& function) {
    for (int64_t e = 0; e < experts; ++e) {
      const int32_t *from = token_of + first[e], *to = token_of + first[e + 1];
      if (ranges > 1) {
        from = std::lower_bound(from, to, begin);
        to = std::lower_bound(from, to, end);
      }
      for (; from < to; ++from) {
        function(*from, static_cast<int32_t>(from - token_of));
      }
    }
  };
  start[0] = 0;
  each_range([&](int64_t range, int64_t begin, int64_t end) {
    std::fill(start + begin + 1, start + end + 1, 0);
    each_slot(begin, end, [&](int32_t t, int32_t) { ++start[t + 1]; });
    slots_of[range + 1] = std::accumulate(start + begin + 1, start + end + 1, 0);
  });
  std::partial_sum(slots_of.begin(), slots_of.end(), slots_of.begin());
  each_range([&](int64_t range, int64_t begin, int64_t end) {
    // start[t + 1] is where token t's next slot goes: in the end, where token t + 1 starts.
    std::exclusive_scan(start + begin + 1, start + end + 1, start + begin + 1, slots_of[range]);
    each_slot(begin, end, [&](int32_t t, int32_t s) { sorted[start[t + 1]++] = s; });
  });
  return {token_offsets, slot};
}

RoutingTensors merge_routings_cpu(at::TensorList token, at::TensorList expert_offsets, at::TensorList rows,
                                  int64_t num_tokens) {
  TORCH_CHECK(!token.empty() && expert_offsets.size() == token.size() && rows.size() == token.size(),
              "merge_routings: got ", token.size(), " lists of tokens, ", expert_offsets.size(),
              " of offsets and ", rows.size(), " of rows");
  const int64_t experts = expert_offsets[0].size(0) - 1;
  // Expert and row in the whole of every slot, in the order of the parts.
  std::vector<int32_t> expert_of, row_of;
  for (size_t i = 0; i < token.size(); ++i) {
    const at::Tensor tokens = token[i].contiguous(), offsets = expert_offsets[i].contiguous(),
                     places = rows[i].to(at::kLong).contiguous();
    TORCH_CHECK(tokens.scalar_type() == at::kInt && offsets.scalar_type() == at::kInt && tokens.dim() == 1 &&
                    offsets.sizes() == at::IntArrayRef({experts + 1}) && places.dim() == 1,
                "merge_routings: part ", i, " has tokens ", tokens.scalar_type(), " ", tokens.sizes(),
                ", offsets ", offsets.scalar_type(), " ", offsets.sizes(), " and rows ", places.sizes());
    const int64_t* place = places.const_data_ptr<int64_t>();
    const auto [low, high] = std::minmax_element(place, place + places.size(0));
    TORCH_CHECK_VALUE(places.size(0) == 0 || (*low >= 0 && *high < num_tokens), "rows lie from ", *low,
                      " to ", *high, ", outside the ", num_tokens, " of the whole");
    const int32_t *t = tokens.const_data_ptr<int32_t>(), *first = offsets.const_data_ptr<int32_t>();
    TORCH_CHECK_VALUE(
        first[0] == 0 && std::is_sorted(first, first + experts + 1) && first[experts] == tokens.size(0),
        "Routing.expert_offsets must rise from 0 to ", tokens.size(0), ", the number of slots");
    for (int64_t e = 0; e < experts; ++e) {
      expert_of.insert(expert_of.end(), first[e + 1] - first[e], static_cast<int32_t>(e));
    }
    for (int64_t s = 0; s < tokens.size(0); ++s) {
      TORCH_CHECK_VALUE(t[s] >= 0 && t[s] < places.size(0), "Routing.token holds the index ", t[s],
                        ", outside 0 to ", places.size(0) - 1);
      row_of.push_back(static_cast<int32_t>(place[t[s]]));
    }
  }
  const int64_t slots = static_cast<int64_t>(row_of.size());
  at::Tensor merged = at::empty({slots}, at::kInt), order = at::empty({slots}, at::kLong),
             merged_offsets = at::empty({experts + 1}, at::kInt);
  int32_t *merged_token = merged.mutable_data_ptr<int32_t>(),
          *offsets = merged_offsets.mutable_data_ptr<int32_t>();
  int64_t* order_of = order.mutable_data_ptr<int64_t>();

  // Two counting sorts, first by row, then by expert: start[k + 1] is where the next one of key k goes.
  const auto starts = [](const std::vector<int32_t>& keys, int32_t* start, int64_t count) {
    std::fill_n(start, count + 1, 0);
    for (const int32_t key : keys) {
      ++start[key + 1];
    }
    std::exclusive_scan(start + 1, start + count + 1, start + 1, 0);
  };
  std::vector<int32_t> next(num_tokens + 1), by_row(slots);
  starts(row_of, next.data(), num_tokens);
  for (int64_t s = 0; s < slots; ++s) {
    by_row[next[row_of[s] + 1]++] = static_cast<int32_t>(s);
  }
  starts(expert_of, offsets, experts);
  for (const int32_t s : by_row) {
    const int32_t place = offsets[expert_of[s] + 1]++;
    merged_token[place] = row_of[s];
    order_of[place] = s;
  }
  const auto [token_offsets, slot] = sort_by_token(merged, merged_offsets, num_tokens);
  return {order, merged, merged_offsets, token_offsets, slot};
}

RoutingTensors routing_from_choices_cpu(const at::Tensor& index, int64_t num_experts,
                                        bool drop_out_of_range) {
  TORCH_CHECK(index.dim() == 2 && num_experts >= 1 &&
                  (index.scalar_type() == at::kInt || index.scalar_type() == at::kLong) &&
                  index.numel() <= std::numeric_limits<int32_t>::max(),
              "routing_from_choices: index is ", index.scalar_type(), " ", index.sizes(), " of ", num_experts,
              " experts; expected int32 or int64 [tokens, choices], less than 2^31 of them, and an expert");
  const int64_t tokens = index.size(0), top_k = index.size(1), choices = index.numel();
  const at::Tensor held = index.to(at::kLong).contiguous();
  const int64_t* expert_of = held.const_data_ptr<int64_t>();
  const auto [low, high] = std::minmax_element(expert_of, expert_of + choices);
  TORCH_CHECK_VALUE(choices == 0 || (*low >= 0 && (drop_out_of_range || *high < num_experts)),
                    "index holds experts from ", *low, " to ", *high, ", outside 0 to ", num_experts - 1);

  // A counting sort: offsets[e + 1] is where expert e's next slot goes, in the end where e + 1 starts.
  at::Tensor expert_offsets = at::empty({num_experts + 1}, at::kInt);
  int32_t* offsets = expert_offsets.mutable_data_ptr<int32_t>();
  std::fill_n(offsets, num_experts + 1, 0);
  int64_t slots = 0;
  for (int64_t c = 0; c < choices; ++c) {
    if (expert_of[c] < num_experts) {
      ++offsets[expert_of[c] + 1];
      ++slots;
    }
  }
  std::exclusive_scan(offsets + 1, offsets + num_experts + 1, offsets + 1, 0);
  at::Tensor order = at::empty({slots}, at::kLong), token = at::empty({slots}, at::kInt);
  int64_t* order_of = order.mutable_data_ptr<int64_t>();
  int32_t* token_of = token.mutable_data_ptr<int32_t>();
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t c = t * top_k; c < (t + 1) * top_k; ++c) {
      if (expert_of[c] < num_experts) {
        const int32_t place = offsets[expert_of[c] + 1]++;
        token_of[place] = static_cast<int32_t>(t);
        order_of[place] = c;
      }
    }
  }
  const auto [token_offsets, slot] = sort_by_token(token, expert_offsets, tokens);
  return {order, token, expert_offsets, token_offsets, slot};
}

}  // namespace pyvlm
