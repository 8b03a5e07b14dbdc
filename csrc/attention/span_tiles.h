// What the forward and the backward share: who sees whom, tile by tile, and the scores' vector arithmetic.
//
// A score tile is kept transposed, Sᵀ = K·Qᵀ: a row is a key, and the queries lie along the vector lanes. So
// a query's range, maximum, lse and delta are vectors, a key's class is a scalar, and no sum runs across
// lanes.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "attention/span_attention.h"
#include "common/pack.h"

namespace pyvlm::CPU_CAPABILITY {

// Keys and queries of a tile: 128 x 256 scores in fp32 and their bf16 copies stay in a 1 MB L2 beside the
// operands. Lengths in between are cut evenly, so that no tile is nearly empty: 130 keys are one tile, not
// 128 and 2.
inline constexpr int64_t kTileKeys = 128, kTileQueries = 256;
inline constexpr int64_t kMaxTileQueries = kTileQueries * 3 / 2;
// Queries are padded to this many lanes, two AVX-512 registers, and a row of a tile is masked by groups of
// them.
inline constexpr int64_t kLanes = 32;

inline int64_t even_tile(int64_t total, int64_t target, int64_t multiple) {
  const int64_t tiles = std::max<int64_t>(1, (total + target / 2) / target);
  return round_up(std::max<int64_t>(1, (total + tiles - 1) / tiles), multiple);
}

// Scores and sums are in fp32, or fp64 for fp64 tensors.
template <typename scalar_t>
using acc_type = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

enum class Cover : uint8_t { empty, partial, full };

// The ranges and key classes of a whole problem, arranged by tile.
class SpanTiles {
 public:
  explicit SpanTiles(const SpanProblem& p)
      : p_(p),
        width_(even_tile(p.I, kTileQueries, kLanes)),
        height_(even_tile(p.J, kTileKeys, 16)),
        query_tiles_((p.I + width_ - 1) / width_),
        key_tiles_((p.J + height_ - 1) / height_),
        extents_(p.B * query_tiles_ * p.ranges),
        classes_(p.B * key_tiles_, 0) {
    for (int64_t b = 0; b < p.B; ++b) {
      for (int64_t i = 0; i < p.I; ++i) {
        for (int r = 0; r < p.ranges; ++r) {
          const int32_t* range = bounds(b, i, r);
          Extent& e = extents_[(b * query_tiles_ + i / width_) * p.ranges + r];
          if (range[0] < range[1]) {
            e.lo_min = std::min(e.lo_min, range[0]);
            e.hi_max = std::max(e.hi_max, range[1]);
            e.lo_max = std::max(e.lo_max, range[0]);
            e.hi_min = std::min(e.hi_min, range[1]);
          } else {
            e.hi_min = 0;  // a query that sees nothing: no tile is full
          }
        }
      }
      for (int64_t j = 0; j < p.J; ++j) {
        classes_[b * key_tiles_ + j / height_] |= uint8_t(1u << p.key_class[b * p.J + j]);
      }
    }
  }

  int64_t width() const { return width_; }    // queries of a tile
  int64_t height() const { return height_; }  // keys of a tile
  int64_t query_tiles() const { return query_tiles_; }
  int64_t key_tiles() const { return key_tiles_; }

  const int32_t* bounds(int64_t b, int64_t i, int r) const {
    return p_.bounds + ((b * p_.I + i) * p_.ranges + r) * 2;
  }

  Cover cover(int64_t b, int64_t query_tile, int64_t key_tile, int r) const {
    const Extent& e = extents_[(b * query_tiles_ + query_tile) * p_.ranges + r];
    const uint8_t present = classes_[b * key_tiles_ + key_tile];
    const int64_t begin = key_tile * height_, end = std::min(begin + height_, p_.J);
    if ((present & p_.range_classes[r]) == 0 || e.hi_max <= begin || e.lo_min >= end) {
      return Cover::empty;
    }
    const bool all_classes = (present & ~p_.range_classes[r]) == 0;
    return all_classes && e.lo_max <= begin && e.hi_min >= end ? Cover::full : Cover::partial;
  }

 private:
  struct Extent {
    int32_t lo_min = std::numeric_limits<int32_t>::max(), lo_max = 0;
    int32_t hi_min = std::numeric_limits<int32_t>::max(), hi_max = 0;
  };

  const SpanProblem& p_;
  int64_t width_, height_, query_tiles_, key_tiles_;
  std::vector<Extent> extents_;
  std::vector<uint8_t> classes_;
};

// One range on one tile. Partial ranges carry their bounds a query, counted from the tile's first key: small
// integers, exact in any floating type, so that they are compared in the scores' own registers. And for each
// group of kLanes queries, between which keys any of them sees something and between which all of them do.
template <typename acc_t>
struct TileRange {
  Cover cover;
  uint8_t classes;
  alignas(64) acc_t lo[kMaxTileQueries];
  alignas(64) acc_t hi[kMaxTileQueries];
  struct {
    acc_t any_lo, any_hi, all_lo, all_hi;
  } groups[kMaxTileQueries / kLanes];

  void load(const SpanProblem& p, const SpanTiles& tiles, int64_t b, int64_t query_tile, int64_t key_tile,
            int r) {
    cover = tiles.cover(b, query_tile, key_tile, r);
    classes = p.range_classes[r];
    if (cover != Cover::partial) {
      return;
    }
    const int64_t first = query_tile * tiles.width(), begin = key_tile * tiles.height();
    const int64_t count = std::min(tiles.width(), p.I - first);
    for (int64_t c = 0; c < tiles.width(); ++c) {
      auto& group = groups[c / kLanes];
      if (c % kLanes == 0) {
        group = {acc_t(tiles.height()), acc_t(0), acc_t(0), acc_t(tiles.height())};
      }
      if (c >= count) {  // what a padding lane sees does not matter
        lo[c] = hi[c] = 0;
        continue;
      }
      const int32_t* range = tiles.bounds(b, first + c, r);
      lo[c] = static_cast<acc_t>(std::clamp<int64_t>(range[0] - begin, 0, tiles.height()));
      hi[c] = static_cast<acc_t>(std::clamp<int64_t>(range[1] - begin, 0, tiles.height()));
      if (lo[c] < hi[c]) {
        group.any_lo = std::min(group.any_lo, lo[c]);
        group.any_hi = std::max(group.any_hi, hi[c]);
      }
      group.all_lo = std::max(group.all_lo, lo[c]);
      group.all_hi = std::min(group.all_hi, hi[c]);
    }
  }

  // How much of the group of lanes that `lane` lies in sees the tile's key `key`.
  Cover row_cover(acc_t key, uint8_t key_class, int64_t lane) const {
    if (cover == Cover::full) {
      return Cover::full;
    }
    const auto& group = groups[lane / kLanes];
    if (cover == Cover::empty || (classes >> key_class & 1) == 0 || key < group.any_lo ||
        key >= group.any_hi) {
      return Cover::empty;
    }
    return key >= group.all_lo && key < group.all_hi ? Cover::full : Cover::partial;
  }
};

// The ranges that one softmax runs over, on one tile.
template <typename acc_t>
struct TileStream {
  using Vec = at::vec::Vectorized<acc_t>;
  TileRange<acc_t> ranges[kMaxRanges];
  int count = 0;
  Cover cover = Cover::empty;

  void load(const SpanProblem& p, const SpanTiles& tiles, int64_t b, int64_t query_tile, int64_t key_tile,
            int stream) {
    count = p.separate ? 1 : p.ranges;
    cover = Cover::empty;
    for (int r = 0; r < count; ++r) {
      ranges[r].load(p, tiles, b, query_tile, key_tile, stream + r);
      cover = std::max(cover, ranges[r].cover);
    }
  }

  Cover row_cover(int64_t key, uint8_t key_class, int64_t lane) const {
    Cover row = cover == Cover::full ? Cover::full : Cover::empty;
    for (int r = 0; r < count && row != Cover::full; ++r) {
      row = std::max(row, ranges[r].row_cover(static_cast<acc_t>(key), key_class, lane));
    }
    return row;
  }

  // Lane mask of the queries from `lane` on that see the tile's key `key`, where row_cover is partial.
  Vec visible(int64_t key, uint8_t key_class, int64_t lane) const {
    const Vec position(static_cast<acc_t>(key));
    Vec mask(acc_t(0));
    for (int r = 0; r < count; ++r) {
      if (ranges[r].cover == Cover::partial && (ranges[r].classes >> key_class & 1) != 0) {
        mask = mask |
               ((Vec::loadu(ranges[r].lo + lane) <= position) & (position < Vec::loadu(ranges[r].hi + lane)));
      }
    }
    return mask;
  }
};

// Scaled scores under a soft cap, in place: cap · tanh(scale · s / cap).
template <typename acc_t>
void cap_scores(acc_t* scores, int64_t count, double scale, double softcap) {
  using Vec = at::vec::Vectorized<acc_t>;
  const Vec cap(static_cast<acc_t>(softcap)), factor(static_cast<acc_t>(scale / softcap));
  for (int64_t i = 0; i < count; i += Vec::size()) {
    (cap * (Vec::loadu(scores + i) * factor).tanh()).store(scores + i);
  }
}

inline at::vec::Vectorized<float> exp_of(const at::vec::Vectorized<float>& x) { return x.exp_u20(); }
inline at::vec::Vectorized<double> exp_of(const at::vec::Vectorized<double>& x) { return x.exp(); }

// Rows of probabilities written as GEMM operands: fp32 and fp64 as they are, bf16 rounded to nearest even.
template <typename acc_t>
inline void store_a_row(acc_t* dst, const at::vec::Vectorized<acc_t>& x0,
                        const at::vec::Vectorized<acc_t>& x1) {
  x0.store(dst);
  x1.store(dst + x0.size());
}

// fp32's bits rounded to nearest even at bf16's last place: bf16 is their upper half.
inline uint32_t round_to_bf16(uint32_t bits) { return bits + 0x7fff + (bits >> 16 & 1); }

inline void store_a_row(at::BFloat16* dst, const at::vec::Vectorized<float>& x0,
                        const at::vec::Vectorized<float>& x1) {
  constexpr int64_t size = at::vec::Vectorized<float>::size();
  alignas(64) uint32_t bits[2 * size];
  x0.store(reinterpret_cast<float*>(bits));
  x1.store(reinterpret_cast<float*>(bits + size));
  auto* out = reinterpret_cast<uint16_t*>(dst);
  for (int64_t c = 0; c < 2 * size; ++c) {
    out[c] = static_cast<uint16_t>(round_to_bf16(bits[c]) >> 16);
  }
}

// Two rows (k, k+1) as a B operand: one after the other, or interleaved in VNNI order.
template <typename acc_t>
inline void store_b_rows(acc_t* dst, int64_t lane, int64_t width, const at::vec::Vectorized<acc_t> (&even)[2],
                         const at::vec::Vectorized<acc_t> (&odd)[2]) {
  store_a_row(dst + lane, even[0], even[1]);
  store_a_row(dst + width + lane, odd[0], odd[1]);
}

inline void store_b_rows(at::BFloat16* dst, int64_t lane, int64_t /*width*/,
                         const at::vec::Vectorized<float> (&even)[2],
                         const at::vec::Vectorized<float> (&odd)[2]) {
  constexpr int64_t size = at::vec::Vectorized<float>::size();
  alignas(64) uint32_t low[2 * size], high[2 * size];
  for (int h = 0; h < 2; ++h) {
    even[h].store(reinterpret_cast<float*>(low + h * size));
    odd[h].store(reinterpret_cast<float*>(high + h * size));
  }
  auto* out = reinterpret_cast<uint32_t*>(dst + 2 * lane);
  for (int64_t c = 0; c < 2 * size; ++c) {
    out[c] = (round_to_bf16(low[c]) >> 16) | (round_to_bf16(high[c]) & 0xffff0000u);
  }
}

}  // namespace pyvlm::CPU_CAPABILITY
