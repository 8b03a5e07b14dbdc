// What the forward and the backward share: who sees whom, block by block, and how scores become powers of
// two.
//
// A score tile is kept transposed, Sᵀ = K·Qᵀ: a row is a key, and the queries lie along the vector lanes. So
// a query's range, maximum, lse and delta are vectors, a key's class is a scalar, and no sum runs across
// lanes.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "attention/span_attention.h"
#include "common/pack.h"

namespace pyvlm::CPU_CAPABILITY {

// Keys and queries of a block: it is empty, full, or masked key by key. 32 queries are two AVX-512 registers
// and two AMX tiles, and the scores of 32 queries with a tile of keys stay in L1.
inline constexpr int64_t kBlock = 32;
// Keys of a tile, whose packed rows stay in L2 while all queries of a query tile pass, and in L1 at best:
// with 96 of them bf16 forwards of head_dim 64 took 8 % less time than with 128, and backwards 7 to 12 %;
// forwards of 128 take 6 % more. Lengths in between are cut evenly, so that no tile is nearly empty: 130 keys
// are one tile, not 128 and 2.
inline constexpr int64_t kTileKeys = 96, kLongTileKeys = 128, kMaxTileKeys = kLongTileKeys * 3 / 2;
inline constexpr int64_t kTileQueries = 256, kMaxTileQueries = kTileQueries * 3 / 2;
inline constexpr int64_t kMaxBlocks = kMaxTileKeys / kBlock, kMaxGroups = kMaxTileQueries / kBlock;

inline int64_t even_tile(int64_t total, int64_t target) {
  const int64_t tiles = std::max<int64_t>(1, (total + target / 2) / target);
  return round_up(std::max<int64_t>(1, (total + tiles - 1) / tiles), kBlock);
}

enum class Cover : uint8_t { empty, partial, full };

// A half-open range of blocks.
struct Blocks {
  int64_t begin = 0, end = 0;

  bool empty() const { return begin >= end; }
  Blocks within(int64_t lowest, int64_t highest) const {
    return {std::max(begin, lowest), std::min(end, highest)};
  }
  Blocks with(const Blocks& other) const {
    if (empty() || other.empty()) {
      return empty() ? other : *this;
    }
    return {std::min(begin, other.begin), std::max(end, other.end)};
  }
};

// The ranges and key classes of a whole problem, summed up for every kBlock queries and every kBlock keys.
class SpanBlocks {
 public:
  explicit SpanBlocks(const SpanProblem& p)
      : p_(p),
        groups_((p.I + kBlock - 1) / kBlock),
        key_blocks_((p.J + kBlock - 1) / kBlock),
        extents_(p.B * groups_ * p.ranges),
        classes_(p.B * p.ranges * key_blocks_) {
    for (int64_t b = 0; b < p.B; ++b) {
      for (int64_t i = 0; i < p.I; ++i) {
        for (int r = 0; r < p.ranges; ++r) {
          const int32_t* range = bounds(b, i, r);
          Extent& e = extents_[(b * groups_ + i / kBlock) * p.ranges + r];
          if (range[0] < range[1]) {
            e.lo_min = std::min(e.lo_min, range[0]);
            e.hi_max = std::max(e.hi_max, range[1]);
            e.lo_max = std::max(e.lo_max, range[0]);
            e.hi_min = std::min(e.hi_min, range[1]);
          } else {
            e.hi_min = 0;  // a query that sees nothing: no block is full
          }
        }
      }
      for (int r = 0; r < p.ranges; ++r) {
        for (int64_t block = 0; block < key_blocks_; ++block) {
          const int64_t begin = block * kBlock, end = std::min(begin + kBlock, p.J);
          int64_t seen = 0;
          for (int64_t j = begin; j < end; ++j) {
            seen += sees_class(b, j, r);
          }
          classes_[(b * p.ranges + r) * key_blocks_ + block] = seen == 0        ? Cover::empty
                                                               : seen == kBlock ? Cover::full
                                                                                : Cover::partial;
        }
      }
    }
  }

  int64_t key_blocks() const { return key_blocks_; }  // blocks of keys

  // The key blocks that the ranges of a group of queries touch, from the first to the last.
  Blocks touched(int64_t b, int64_t group, int first_range, int count) const {
    Blocks all;
    for (int r = first_range; r < first_range + count; ++r) {
      const Extent& e = extent(b, group, r);
      all = all.with({e.lo_min / kBlock, (e.hi_max + kBlock - 1) / kBlock});
    }
    return all;
  }

  // How much of a block one softmax sees, which runs over `count` ranges from first_range on.
  Cover cover(int64_t b, int64_t group, int64_t key_block, int first_range, int count) const {
    Cover cover = Cover::empty;
    for (int r = first_range; r < first_range + count; ++r) {
      const Extent& e = extent(b, group, r);
      const Cover seen = classes_[(b * p_.ranges + r) * key_blocks_ + key_block];
      const int64_t begin = key_block * kBlock, end = begin + kBlock;
      if (seen == Cover::empty || e.hi_max <= begin || e.lo_min >= end) {
        continue;
      }
      cover = std::max(cover, e.lo_max <= begin && e.hi_min >= end ? seen : Cover::partial);
    }
    return cover;
  }

  // Puts −inf into a partly seen block of scores, [kBlock keys, kBlock queries], where a query does not see a
  // key.
  template <typename acc_t>
  void hide(acc_t* scores, int64_t b, int64_t group, int64_t key_block, int first_range, int count) const {
    // Bounds are counted from the block's first key: small integers, exact in any floating type, so that they
    // are compared in the scores' own registers.
    alignas(64) acc_t lo[kMaxRanges][kBlock], hi[kMaxRanges][kBlock];
    const int64_t first = key_block * kBlock, keys = std::min(kBlock, p_.J - first);
    const int64_t queries = std::min(kBlock, p_.I - group * kBlock);
    for (int r = 0; r < count; ++r) {
      const int32_t* range = bounds(b, group * kBlock, first_range + r);
      for (int64_t c = 0; c < kBlock; ++c) {
        const int32_t* of_lane =
            range + (c < queries ? c : 0) * p_.ranges * 2;  // a padding lane sees anything
        lo[r][c] = static_cast<acc_t>(std::clamp<int64_t>(of_lane[0] - first, 0, kBlock));
        hi[r][c] = static_cast<acc_t>(std::clamp<int64_t>(of_lane[1] - first, 0, kBlock));
      }
    }
    const Vec<acc_t> hidden(-std::numeric_limits<acc_t>::infinity());
    for (int64_t j = 0; j < kBlock; ++j) {
      const Vec<acc_t> key(static_cast<acc_t>(j));
      for (int64_t lane = 0; lane < kBlock; lane += Vec<acc_t>::size()) {
        Vec<acc_t> visible(acc_t(0));
        for (int r = 0; r < count && j < keys; ++r) {
          if (sees_class(b, first + j, first_range + r)) {
            visible = visible |
                      ((Vec<acc_t>::loadu(lo[r] + lane) <= key) & (key < Vec<acc_t>::loadu(hi[r] + lane)));
          }
        }
        const int64_t at = j * kBlock + lane;
        Vec<acc_t>::blendv(hidden, Vec<acc_t>::loadu(scores + at), visible).store(scores + at);
      }
    }
  }

 private:
  struct Extent {
    int32_t lo_min = std::numeric_limits<int32_t>::max(), lo_max = 0;
    int32_t hi_min = std::numeric_limits<int32_t>::max(), hi_max = 0;
  };

  const int32_t* bounds(int64_t b, int64_t i, int r) const {
    return p_.bounds + ((b * p_.I + i) * p_.ranges + r) * 2;
  }
  const Extent& extent(int64_t b, int64_t group, int r) const {
    return extents_[(b * groups_ + group) * p_.ranges + r];
  }
  bool sees_class(int64_t b, int64_t j, int r) const {
    return (p_.range_classes[r] >> p_.key_class[b * p_.J + j] & 1) != 0;
  }

  const SpanProblem& p_;
  int64_t groups_, key_blocks_;
  std::vector<Extent> extents_;
  std::vector<Cover> classes_;
};

// How raw scores q·k become powers, 2^(kUnit · ...): power(score, x) = exp(bent score - x / kUnit). The score
// was first bent or scaled in place if a positive factor is not all, so that the largest score stays the
// largest and −inf stays −inf. Where results are rounded to bf16, log2(e) is part of the factor. Elsewhere
// the difference comes first: of scores of thousands, factor · score and lse · log2(e) would round apart.
template <typename acc_t, Precision precision>
struct Scores {
  static constexpr double kLog2e = 1.4426950408889634074, kUnit = precision == Precision::bf16 ? kLog2e : 1;
  bool capped, in_place;
  acc_t factor, scale, cap;

  explicit Scores(const SpanProblem& p)
      : capped(p.softcap != 0),
        in_place(capped || p.scale <= 0),
        factor(static_cast<acc_t>(in_place ? kUnit : p.scale * kUnit)),
        scale(static_cast<acc_t>(p.scale)),
        cap(static_cast<acc_t>(p.softcap)) {}

  void prepare(acc_t* scores, int64_t count) const {
    if (!in_place) {
      return;
    }
    const Vec<acc_t> by(capped ? scale / cap : scale), limit(cap);
    for (int64_t i = 0; i < count; i += Vec<acc_t>::size()) {
      const Vec<acc_t> x = Vec<acc_t>::loadu(scores + i) * by;
      (capped ? limit * x.tanh() : x).store(scores + i);
    }
  }

  static Vec<acc_t> power(const Vec<acc_t>& score, const Vec<acc_t>& factor, const Vec<acc_t>& x) {
    const Vec<acc_t> exponent = at::vec::fmsub(score, factor, x);
    return precision == Precision::bf16 ? exp2<precision>(exponent)
                                        : exp2<precision>(exponent * Vec<acc_t>(static_cast<acc_t>(kLog2e)));
  }
};

// The end of a softmax whose powers over `base` add up to `sum`: its lse, and what each power over `base` is
// to be multiplied by. A sink is one more term of the sum.
template <typename acc_t>
struct Softmax {
  acc_t lse, share;
};

template <typename acc_t>
Softmax<acc_t> end_softmax(const SpanProblem& p, int64_t h, acc_t base, acc_t sum) {
  const acc_t seen = base + std::log(sum);  // −inf + −inf where nothing was seen
  const acc_t share = sum > 0 ? 1 / sum : acc_t(0);
  if (p.sinks == nullptr || p.sinks[h] == -std::numeric_limits<double>::infinity()) {
    return {seen, share};
  }
  const auto sink = static_cast<acc_t>(p.sinks[h]), top = std::max(seen, sink);
  const acc_t lse = top + std::log(std::exp(seen - top) + std::exp(sink - top));
  return {lse, share * std::exp(seen - lse)};
}

// The same of kBlock softmaxes; lse and base differ by the factor `unit`.
template <typename acc_t>
void end_softmaxes(const SpanProblem& p, int64_t h, acc_t unit, const acc_t* base, const acc_t* sum,
                   acc_t* lse, acc_t* share) {
  using V = Vec<acc_t>;
  const V zero(acc_t(0)), one(acc_t(1));
  for (int64_t c = 0; c < kBlock; c += V::size()) {
    const V of_lane = V::loadu(sum + c);
    (V::loadu(base + c) * V(unit) + of_lane.log()).store(lse + c);
    V::blendv(zero, one / of_lane, of_lane > zero).store(share + c);
  }
  for (int64_t c = 0; c < kBlock && p.sinks != nullptr; ++c) {
    const Softmax<acc_t> with_sink = end_softmax(p, h, base[c] * unit, sum[c]);
    lse[c] = with_sink.lse;
    share[c] = with_sink.share;
  }
}

}  // namespace pyvlm::CPU_CAPABILITY
