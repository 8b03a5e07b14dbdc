// The tokens of a batch in runs of text and of placeholders, shared out among torch's threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/parallel.h"

namespace pyvlm {

// Consecutive tokens of one sample: all text, or the placeholders of consecutive image rows.
struct TokenRun {
  int64_t sample, token, count;
  int64_t image_row;  // of the first token; -1 where they are text
  bool is_image() const { return image_row >= 0; }
};

class TokenRuns {
 public:
  // mask [B, L], true at the placeholders; null where every token is one. `row_bytes` of each token are
  // copied.
  TokenRuns(const bool* mask, int64_t B, int64_t L, int64_t row_bytes) : mask_(mask), L_(L) {
    const int64_t length = std::clamp<int64_t>(kBlockBytes / std::max<int64_t>(row_bytes, 1), 1, 1 << 16);
    blocks_.reserve(B * ((L + length - 1) / length));
    work_ = kWorkOfAByte * row_bytes * std::min(length, L);
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t l = 0; l < L; l += length) {
        const int64_t end = std::min(l + length, L);
        blocks_.push_back({b, l, end, placeholders_});
        placeholders_ += mask == nullptr ? end - l : std::count(mask + b * L + l, mask + b * L + end, true);
      }
    }
  }

  int64_t placeholders() const { return placeholders_; }

  // Calls visit(run) for each of them, on several threads.
  template <typename Visit>
  void for_each(const Visit& visit) const {
    run_each(static_cast<int64_t>(blocks_.size()), work_, [&](int64_t task) {
      const Block& block = blocks_[task];
      int64_t image_row = block.image_row;
      for (int64_t l = block.begin; l < block.end;) {
        const bool* first = mask_ == nullptr ? nullptr : mask_ + block.sample * L_ + l;
        const bool is_image = first == nullptr || *first;
        const int64_t count =
            first == nullptr ? block.end - l : std::find(first, first + (block.end - l), !*first) - first;
        visit(TokenRun{block.sample, l, count, is_image ? image_row : -1});
        image_row += is_image ? count : 0;
        l += count;
      }
    });
  }

  static constexpr int64_t kBlockBytes = 128 << 10;
  // In the multiply-adds that `run_each` weighs tasks by: a thread writes some 10 GB/s of copies.
  static constexpr int64_t kWorkOfAByte = 8;

 private:
  struct Block {
    int64_t sample, begin, end, image_row;
  };
  const bool* mask_;
  int64_t L_;
  int64_t placeholders_ = 0;
  int64_t work_;
  std::vector<Block> blocks_;
};

}  // namespace pyvlm
