// The forward: a task is a (batch, key/value head) and some of its query tiles. It packs keys and values
// once, then each query tile walks the key tiles that its queries see, 32 queries at a time, with a running
// maximum.
#include "attention/span_blocks.h"
#include "common/arena.h"
#include "common/parallel.h"

namespace pyvlm::CPU_CAPABILITY {
namespace {

template <typename scalar_t, typename Gemm>
class Forward {
 public:
  explicit Forward(const SpanForward& args)
      : a_(args),
        p_(args.problem),
        blocks_(p_),
        scores_(p_),
        width_(even_tile(p_.I, kTileQueries)),
        height_(even_tile(p_.J, p_.D <= 64 ? kTileKeys : kLongTileKeys)),
        query_tiles_((p_.I + width_ - 1) / width_),
        key_tiles_((p_.J + height_ - 1) / height_),
        depth_(round_up(p_.D, Gemm::kDepth)) {}

  void run() {
    // Packing costs a key about as much as attending to it from 40 queries: a task should have more.
    constexpr int64_t kMinTiles = 4;
    const int64_t tiles = p_.H / p_.G * query_tiles_, heads = p_.B * p_.G;
    const int64_t parts = std::clamp<int64_t>(4 * at::get_num_threads() / std::max<int64_t>(heads, 1), 1,
                                              std::max<int64_t>(1, tiles / kMinTiles));
    Arena size;
    Scratch(size, *this);
    run_tasks(heads * parts, tiles * width_ * p_.J * p_.D / parts, [&](TaskQueue& queue) {
      const ThreadScratch memory(size.used());
      Arena arena = memory.arena();
      const Scratch scratch(arena, *this);
      [[maybe_unused]] const typename Gemm::Session session;
      for (int64_t task = queue.next(); task >= 0; task = queue.next()) {
        const int64_t b = task / parts / p_.G, g = task / parts % p_.G;
        pack_keys_and_values(scratch, b, g);
        // Later tiles see more under a causal mask: every part gets some of each.
        for (int64_t i = task % parts; i < tiles; i += parts) {
          attend(scratch, b, g * (p_.H / p_.G) + i / query_tiles_, i % query_tiles_);
        }
      }
    });
  }

 private:
  using op_t = typename Gemm::op_t;
  using acc_t = typename Gemm::acc_t;
  using V = Vec<acc_t>;
  static constexpr int kVecs = kBlock / V::size();
  static constexpr Precision kPrecision = kPrecisionOf<scalar_t>;
  using Power = Scores<acc_t, kPrecision>;
  using Started = bool[kMaxRanges][kMaxGroups];  // whether o_t holds anything yet

  // What 32 queries see of a tile of keys in one softmax.
  struct Item {
    int64_t group, tile;
    int stream;
    Blocks seen;  // of the tile's blocks, from the first to the last that is not empty
    Cover covers[kMaxBlocks];
  };

  struct Scratch {
    Operand<op_t> k;         // [keys, depth], A operand
    Operand<op_t> v_t;       // a key tile after another, [depth, height], A operands
    Operand<op_t> q_t;       // a group of 32 queries after another, [depth, 32], B operands
    acc_t* scores;           // [height, 32]
    Operand<op_t> p_t;       // [height, 32], B operand
    acc_t* shrink;           // [32]: what is left of the sums so far, where a base moved
    acc_t* o_t[kMaxRanges];  // a group after another, [depth, 32], not yet divided by the sum
    acc_t *base[kMaxRanges], *sum[kMaxRanges];  // [width]: sum of power(score, base)

    Scratch(Arena& arena, const Forward& f) {
      constexpr int64_t planes = Gemm::kPlanes;
      const int64_t keys = f.key_tiles_ * f.height_ * f.depth_, tile = f.height_ * kBlock;
      k = {arena.take<op_t>(planes * keys), f.depth_, keys};
      v_t = {arena.take<op_t>(planes * keys), f.height_, keys};
      q_t = {arena.take<op_t>(planes * f.width_ * f.depth_), kBlock, f.width_ * f.depth_};
      scores = arena.take<acc_t>(tile);
      p_t = {arena.take<op_t>(planes * tile), kBlock, tile};
      shrink = arena.take<acc_t>(kMaxRanges * kBlock);
      for (int s = 0; s < f.p_.streams(); ++s) {
        o_t[s] = arena.take<acc_t>(f.depth_ * f.width_);
        base[s] = arena.take<acc_t>(f.width_);
        sum[s] = arena.take<acc_t>(f.width_);
      }
    }
  };

  void pack_keys_and_values(const Scratch& x, int64_t b, int64_t g) const {
    for (int64_t t = 0; t < key_tiles_; ++t) {
      const int64_t first = t * height_, rows = std::min(height_, p_.J - first);
      pack_a<Gemm>(x.k.from(first * depth_), a_.k.template at<scalar_t>(b, g, first), a_.k.token, rows, p_.D,
                   height_, depth_);
      pack_a_transposed<Gemm>(x.v_t.from(first * depth_), a_.v.template at<scalar_t>(b, g, first), a_.v.token,
                              rows, p_.D, height_, depth_);
    }
  }

  void attend(const Scratch& x, int64_t b, int64_t h, int64_t query_tile) const {
    const int64_t first = query_tile * width_, queries = std::min(width_, p_.I - first);
    const int64_t groups = (queries + kBlock - 1) / kBlock, first_group = first / kBlock;
    for (int s = 0; s < p_.streams(); ++s) {
      std::fill(x.base[s], x.base[s] + width_, -std::numeric_limits<acc_t>::infinity());
      std::fill(x.sum[s], x.sum[s] + width_, acc_t(0));
    }
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t i = first + group * kBlock;
      pack_b_transposed<Gemm>(x.q_t.from(group * kBlock * depth_), a_.q.template at<scalar_t>(b, h, i),
                              a_.q.token, std::min(kBlock, p_.I - i), p_.D, kBlock, depth_);
    }
    static thread_local std::vector<Item> items;
    list_items(items, b, first_group, groups);
    Started started = {};
    for (const Item& item : items) {
      const int64_t row = item.seen.begin * kBlock, keys = (item.seen.end - item.seen.begin) * kBlock;
      Gemm::multiply({keys, kBlock, depth_, x.k.from((item.tile * height_ + row) * depth_),
                      x.q_t.from(item.group * kBlock * depth_), x.scores + row * kBlock, kBlock, false});
      acc_t* o_t = x.o_t[item.stream] + item.group * kBlock * depth_;
      bool& accumulate = started[item.stream][item.group];
      if (exponentiate(x, b, first_group, item) && accumulate) {
        scale_columns(o_t, x.shrink);
      }
      Gemm::multiply({depth_, kBlock, keys, x.v_t.from(item.tile * height_ * depth_ + row),
                      x.p_t.from(row * kBlock), o_t, kBlock, accumulate});
      accumulate = true;
    }
    finish(x, b, h, first, queries, started);
  }

  // What the queries of a tile have to do, a key tile after another, so that its keys and values stay in
  // cache.
  void list_items(std::vector<Item>& items, int64_t b, int64_t first_group, int64_t groups) const {
    const int per_stream = p_.separate ? 1 : p_.ranges, streams = p_.streams();
    Blocks touched[kMaxGroups][kMaxRanges], all;
    for (int64_t group = 0; group < groups; ++group) {
      for (int s = 0; s < streams; ++s) {
        touched[group][s] = blocks_.touched(b, first_group + group, s, per_stream);
        all = all.with(touched[group][s]);
      }
    }
    items.clear();
    const int64_t tile_blocks = height_ / kBlock;
    for (int64_t t = all.begin / tile_blocks; t * tile_blocks < all.end; ++t) {
      for (int64_t group = 0; group < groups; ++group) {
        for (int s = 0; s < streams; ++s) {
          Item item{group, t, s, {}, {}};
          const Blocks candidates = touched[group][s].within(t * tile_blocks, (t + 1) * tile_blocks);
          for (int64_t block = candidates.begin; block < candidates.end; ++block) {
            const int64_t i = block - t * tile_blocks;
            item.covers[i] = blocks_.cover(b, first_group + group, block, s, per_stream);
            if (item.covers[i] != Cover::empty) {
              item.seen = item.seen.with({i, i + 1});
            }
          }
          if (!item.seen.empty()) {
            items.push_back(item);
          }
        }
      }
    }
  }

  // Turns an item's scores into probabilities power(score, base), not yet divided by their sum, as an
  // operand. Returns whether the base of any query moved.
  bool exponentiate(const Scratch& x, int64_t b, int64_t first_group, const Item& item) const {
    const int64_t offset = item.group * kBlock;
    acc_t *scores = x.scores, *base = x.base[item.stream] + offset, *sum = x.sum[item.stream] + offset;
    const V factor(scores_.factor), zero(acc_t(0)), lowest(-std::numeric_limits<acc_t>::infinity());
    scores_.prepare(scores + item.seen.begin * kBlock * kBlock,
                    (item.seen.end - item.seen.begin) * kBlock * kBlock);
    V top[2][kVecs];
    for (int v = 0; v < kVecs; ++v) {
      top[0][v] = top[1][v] = lowest;
    }
    for (int64_t i = item.seen.begin; i < item.seen.end; ++i) {
      acc_t* block = scores + i * kBlock * kBlock;
      if (item.covers[i] == Cover::empty) {
        continue;
      }
      if (item.covers[i] == Cover::partial) {
        blocks_.hide(block, b, first_group + item.group, item.tile * (height_ / kBlock) + i, item.stream,
                     p_.separate ? 1 : p_.ranges);
      }
      for (int64_t j = 0; j < kBlock; j += 2) {
        for (int v = 0; v < kVecs; ++v) {
          const acc_t* at = block + j * kBlock + v * V::size();
          top[0][v] = at::vec::clamp_min(V::loadu(at), top[0][v]);
          top[1][v] = at::vec::clamp_min(V::loadu(at + kBlock), top[1][v]);
        }
      }
    }
    V used[kVecs];
    bool moved = false;
    for (int v = 0; v < kVecs; ++v) {
      // A base need not be the maximum: until a score leaves it behind by more than 2^8 it stays, and what
      // was summed up needs no new scale. Each query decides for itself, since no row may depend on another.
      const V slack(acc_t(8)), old = V::loadu(base + v * V::size());
      const V highest = at::vec::clamp_min(top[0][v], top[1][v]) * factor;
      const V next = V::blendv(old, highest, highest > old + slack);
      const V stays = next == old;
      moved |= stays.zero_mask() != 0;
      used[v] = V::blendv(next, zero, next == lowest);  // −inf − (−inf) must not be made
      // Exactly 1 where the base stays: that another query's moves must not show.
      const V left =
          exp2<Precision::full>((old - used[v]) * V(static_cast<acc_t>(Power::kLog2e / Power::kUnit)));
      const V shrink = V::blendv(left, V(acc_t(1)), stays);
      next.store(base + v * V::size());
      shrink.store(x.shrink + v * V::size());
      (V::loadu(sum + v * V::size()) * shrink).store(sum + v * V::size());
    }
    for (int64_t i = item.seen.begin; i < item.seen.end; ++i) {
      const acc_t* block = item.covers[i] == Cover::empty ? nullptr : scores + i * kBlock * kBlock;
      exponentiate_block(x.p_t.from(i * kBlock * kBlock), block, factor, used, sum);
    }
    return moved;
  }

  // A function of its own, so that all it needs stays in registers.
  [[gnu::noinline]] static void exponentiate_block(const Operand<op_t>& to, const acc_t* scores,
                                                   const V factor, const V (&base)[kVecs], acc_t* sum) {
    const V zero(acc_t(0));
    if (scores == nullptr) {
      for (int64_t j = 0; j < kBlock; j += 2) {
        for (int v = 0; v < kVecs; ++v) {
          store_b_pair<Gemm>(to, j, v * V::size(), zero, zero);
        }
      }
      return;
    }
    for (int v = 0; v < kVecs; ++v) {
      const int64_t lane = v * V::size();
      const V of_lane = base[v];
      V total[2] = {V::loadu(sum + lane), zero};
      for (int64_t j = 0; j < kBlock; j += 2) {
        const acc_t* at = scores + j * kBlock + lane;
        const V even = Power::power(V::loadu(at), factor, of_lane);
        const V odd = Power::power(V::loadu(at + kBlock), factor, of_lane);
        total[0] = total[0] + even;
        total[1] = total[1] + odd;
        store_b_pair<Gemm>(to, j, lane, even, odd);
      }
      (total[0] + total[1]).store(sum + lane);
    }
  }

  void scale_columns(acc_t* o_t, const acc_t* factor) const {
    for (int64_t d = 0; d < p_.D; ++d) {
      for (int64_t c = 0; c < kBlock; ++c) {
        o_t[d * kBlock + c] *= factor[c];
      }
    }
  }

  void finish(const Scratch& x, int64_t b, int64_t h, int64_t first, int64_t queries,
              const Started& started) const {
    const int streams = p_.streams();
    acc_t* lse = static_cast<acc_t*>(a_.lse) + (b * p_.H + h) * streams * p_.I + first;
    for (int64_t c0 = 0; c0 < queries; c0 += kBlock) {
      const int64_t count = std::min(kBlock, queries - c0), i = first + c0;
      acc_t *sums[kMaxRanges] = {}, *shares[kMaxRanges] = {x.shrink, x.shrink + kBlock};
      for (int s = 0; s < streams; ++s) {
        alignas(64) acc_t of_lane[kBlock];
        end_softmaxes(p_, h, acc_t(1 / Power::kUnit), x.base[s] + c0, x.sum[s] + c0, of_lane, shares[s]);
        std::copy(of_lane, of_lane + count, lse + s * p_.I + c0);
        sums[s] = started[s][c0 / kBlock] ? x.o_t[s] + c0 * depth_ : nullptr;
      }
      if (streams == 2) {
        store(a_.stream_out, sums[0], shares[0], b, h, i, count);
      }
      if (sums[0] == nullptr || sums[1] == nullptr) {
        const int only = sums[0] == nullptr ? 1 : 0;
        store(a_.out, sums[only], shares[only], b, h, i, count);
        continue;
      }
      for (int64_t d = 0; d < p_.D; ++d) {
        for (int64_t c = 0; c < kBlock; ++c) {
          acc_t& sum = sums[0][d * kBlock + c];
          sum = sum * shares[0][c] + sums[1][d * kBlock + c] * shares[1][c];
        }
      }
      std::fill(shares[0], shares[0] + kBlock, acc_t(1));
      store(a_.out, sums[0], shares[0], b, h, i, count);
    }
  }

  // Sums [depth, 32], each query's times its scale, as rows of a tensor; zeros where there are none.
  void store(const Strided& out, const acc_t* sums, const acc_t* scale, int64_t b, int64_t h, int64_t first,
             int64_t count) const {
    if (sums != nullptr) {
      store_transposed(out.template at<scalar_t>(b, h, first), out.token, out.dim, sums, kBlock, count, p_.D,
                       scale);
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      scalar_t* row = out.template at<scalar_t>(b, h, first + i);
      for (int64_t d = 0; d < p_.D; ++d) {
        row[d * out.dim] = scalar_t(0);
      }
    }
  }

  const SpanForward& a_;
  const SpanProblem& p_;
  SpanBlocks blocks_;
  Power scores_;
  int64_t width_, height_, query_tiles_, key_tiles_, depth_;
};

}  // namespace

void span_attention_forward(const SpanForward& args) {
  with_engine(args.problem.dtype,
              [&](auto scalar, auto engine) { Forward<decltype(scalar), decltype(engine)>(args).run(); });
}

}  // namespace pyvlm::CPU_CAPABILITY
