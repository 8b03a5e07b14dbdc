// The backward: a task is a (batch, key/value head) and makes its dK and dV and the dQ of its query heads in
// one pass, five GEMMs a tile. No two tasks write the same place, and the order of every sum is fixed:
// deterministic by construction. Where heads are few, a head is cut into parts, whose dK and dV are summed up
// in order.
#include "attention/span_blocks.h"
#include "common/arena.h"
#include "common/empty.h"
#include "common/parallel.h"

namespace pyvlm::CPU_CAPABILITY {
namespace {

template <typename scalar_t, typename Gemm>
class Backward {
 public:
  explicit Backward(const SpanBackward& args)
      : a_(args),
        p_(args.problem),
        blocks_(p_),
        scores_(p_),
        width_(even_tile(p_.I, kTileQueries)),
        height_(even_tile(p_.J, kTileKeys)),
        query_tiles_((p_.I + width_ - 1) / width_),
        key_tiles_((p_.J + height_ - 1) / height_),
        depth_(round_up(p_.D, Gemm::kDepth)),
        keys_(key_tiles_ * height_),
        parts_(parts()) {}

  void run() {
    const int64_t tiles = p_.H / p_.G * query_tiles_, tasks = p_.B * p_.G * parts_;
    at::Tensor partial;
    if (parts_ > 1) {
      partial = make_plain({tasks * 2 * keys_ * depth_}, c10::CppTypeToScalarType<acc_t>::value);
    }
    acc_t* partials = parts_ > 1 ? partial.mutable_data_ptr<acc_t>() : nullptr;
    std::vector<double> grad_sinks(a_.grad_sinks == nullptr ? 0 : p_.B * p_.H * query_tiles_);
    Arena size;
    Scratch(size, *this);
    run_tasks(tasks, tiles * width_ * p_.J * p_.D / parts_, [&](TaskQueue& queue) {
      const ThreadScratch memory(size.used());
      Arena arena = memory.arena();
      Scratch x(arena, *this);
      [[maybe_unused]] const typename Gemm::Session session;
      for (int64_t task = queue.next(); task >= 0; task = queue.next()) {
        const int64_t b = task / parts_ / p_.G, g = task / parts_ % p_.G;
        if (parts_ > 1) {
          x.dk = partials + task * 2 * keys_ * depth_;
          x.dv = x.dk + keys_ * depth_;
        }
        std::fill(x.dk, x.dk + keys_ * depth_, acc_t(0));
        std::fill(x.dv, x.dv + keys_ * depth_, acc_t(0));
        pack_keys_and_values(x, b, g);
        for (int64_t i = task % parts_; i < tiles; i += parts_) {
          const int64_t h = g * (p_.H / p_.G) + i / query_tiles_;
          query_tile(x, b, h, i % query_tiles_, grad_sinks.data());
        }
        if (parts_ == 1) {
          store_keys_and_values(b, g, x.dk, x.dv, 0, p_.J);
        }
      }
    });
    if (parts_ > 1) {
      add_parts(partials);
    }
    for (int64_t head = 0; a_.grad_sinks != nullptr && head < p_.B * p_.H; ++head) {
      const double* of_head = grad_sinks.data() + head * query_tiles_;
      a_.grad_sinks[head] = std::accumulate(of_head, of_head + query_tiles_, 0.0);
    }
  }

 private:
  using op_t = typename Gemm::op_t;
  using acc_t = typename Gemm::acc_t;
  using V = Vec<acc_t>;
  static constexpr int kVecs = kBlock / V::size();
  static constexpr Precision kPrecision = kPrecisionOf<scalar_t>;
  using Power = Scores<acc_t, kPrecision>;

  struct Scratch {
    // Of the key/value head.
    Operand<op_t> k, v;  // [keys, depth], A operands
    Operand<op_t> k_t;   // a key tile after another, [depth, height], A operands
    acc_t *dk, *dv;      // [keys, depth]
    // Of one query tile.
    Operand<op_t> q_t, do_t;  // a group of 32 queries after another, [depth, 32], B operands
    Operand<op_t> q, grad;    // [width, depth], B operands
    acc_t* dq_t;              // a group after another, [depth, 32]
    acc_t *lse[kMaxRanges], *delta[kMaxRanges];  // [width]; lse in Power's unit
    // Of one tile.
    acc_t *scores, *masked[kMaxRanges], *dp;  // [height, 32]
    Operand<op_t> p, ds;                      // [height, width], A operands
    Operand<op_t> ds_b;                       // [height, 32], B operand

    Scratch(Arena& arena, const Backward& f) {
      constexpr int64_t planes = Gemm::kPlanes;
      const int64_t keys = f.keys_ * f.depth_, queries = f.width_ * f.depth_, tile = f.height_ * f.width_,
                    column = f.height_ * kBlock;
      const auto operand = [&](int64_t count, int64_t ld) {
        return Operand<op_t>{arena.take<op_t>(planes * count), ld, count};
      };
      k = operand(keys, f.depth_);
      v = operand(keys, f.depth_);
      k_t = operand(keys, f.height_);
      dk = arena.take<acc_t>(f.parts_ > 1 ? 0 : keys);
      dv = arena.take<acc_t>(f.parts_ > 1 ? 0 : keys);
      q_t = operand(queries, kBlock);
      do_t = operand(queries, kBlock);
      q = operand(queries, f.depth_);
      grad = operand(queries, f.depth_);
      dq_t = arena.take<acc_t>(queries);
      for (int s = 0; s < f.p_.streams(); ++s) {
        lse[s] = arena.take<acc_t>(f.width_);
        delta[s] = arena.take<acc_t>(f.width_);
        masked[s] = arena.take<acc_t>(column);
      }
      scores = arena.take<acc_t>(column);
      dp = arena.take<acc_t>(column);
      p = operand(tile, f.width_);
      ds = operand(tile, f.width_);
      if constexpr (Gemm::kVnni == 2) {
        ds_b = operand(column, kBlock);
      }
    }
  };

  // What every group of queries sees of a tile.
  struct TileCover {
    Cover covers[kMaxGroups][kMaxRanges][kMaxBlocks];
    Blocks seen[kMaxGroups];     // key blocks that a group of queries sees
    Blocks seen_by[kMaxBlocks];  // groups that see a key block
    bool any[kMaxGroups][kMaxBlocks];
  };

  // How many parts a head is cut into: few heads leave cores idle. It hangs on the shapes alone, for the same
  // bits at any number of threads; and the parts' sums take no more memory than the output.
  int64_t parts() const {
    constexpr int64_t kEnoughTasks = 8, kMinTiles = 4;
    const int64_t heads = std::max<int64_t>(1, p_.B * p_.G), tiles = p_.H / p_.G * query_tiles_;
    const int64_t output = p_.H * p_.I * static_cast<int64_t>(sizeof(scalar_t));
    const int64_t sums = std::max<int64_t>(1, p_.G * p_.J) * static_cast<int64_t>(2 * sizeof(acc_t));
    return std::max<int64_t>(1, std::min({kEnoughTasks / heads, tiles / kMinTiles, output / sums}));
  }

  void pack_keys_and_values(const Scratch& x, int64_t b, int64_t g) const {
    for (int64_t t = 0; t < key_tiles_; ++t) {
      const int64_t first = t * height_, rows = std::min(height_, p_.J - first), at = first * depth_;
      const scalar_t* k = a_.k.template at<scalar_t>(b, g, first);
      const scalar_t* v = a_.v.template at<scalar_t>(b, g, first);
      pack_a<Gemm>(x.k.from(at), k, a_.k.token, rows, p_.D, height_, depth_);
      pack_a<Gemm>(x.v.from(at), v, a_.v.token, rows, p_.D, height_, depth_);
      pack_a_transposed<Gemm>(x.k_t.from(at), k, a_.k.token, rows, p_.D, height_, depth_);
    }
  }

  void query_tile(const Scratch& x, int64_t b, int64_t h, int64_t tile, double* grad_sinks) const {
    const int64_t first = tile * width_, queries = std::min(width_, p_.I - first);
    const int64_t groups = (queries + kBlock - 1) / kBlock;
    const int per_stream = p_.separate ? 1 : p_.ranges;
    Blocks all;
    for (int64_t group = 0; group < groups; ++group) {
      for (int s = 0; s < p_.streams(); ++s) {
        all = all.with(blocks_.touched(b, first / kBlock + group, s, per_stream));
      }
      load_queries(x, b, h, first + group * kBlock, group);
    }
    const double grad_sink = load_softmax(x, b, h, first, queries);
    if (a_.grad_sinks != nullptr) {
      grad_sinks[(b * p_.H + h) * query_tiles_ + tile] = grad_sink;
    }
    const int64_t tile_blocks = height_ / kBlock;
    bool started[kMaxGroups] = {};
    TileCover cover;
    for (int64_t t = all.begin / tile_blocks; t * tile_blocks < all.end; ++t) {
      if (look(cover, b, first / kBlock, groups, t)) {
        key_tile(x, cover, b, first / kBlock, groups, t, started);
      }
    }
    alignas(64) acc_t scale[kBlock];
    std::fill(scale, scale + kBlock, static_cast<acc_t>(p_.scale));
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t i = first + group * kBlock;
      acc_t* dq_t = x.dq_t + group * kBlock * depth_;
      if (!started[group]) {
        std::fill(dq_t, dq_t + kBlock * depth_, acc_t(0));
      }
      store_transposed(a_.grad_q.template at<scalar_t>(b, h, i), a_.grad_q.token, a_.grad_q.dim, dq_t, kBlock,
                       std::min(kBlock, p_.I - i), p_.D, scale);
    }
  }

  void load_queries(const Scratch& x, int64_t b, int64_t h, int64_t i, int64_t group) const {
    const int64_t rows = std::min(kBlock, p_.I - i), at = group * kBlock * depth_;
    const scalar_t* q = a_.q.template at<scalar_t>(b, h, i);
    const scalar_t* grad = a_.grad_out.template at<scalar_t>(b, h, i);
    pack_b_transposed<Gemm>(x.q_t.from(at), q, a_.q.token, rows, p_.D, kBlock, depth_);
    pack_b_transposed<Gemm>(x.do_t.from(at), grad, a_.grad_out.token, rows, p_.D, kBlock, depth_);
    pack_b<Gemm>(x.q.from(at), q, a_.q.token, rows, p_.D, kBlock, depth_);
    pack_b<Gemm>(x.grad.from(at), grad, a_.grad_out.token, rows, p_.D, kBlock, depth_);
  }

  // lse and delta of the tile's queries. Returns the gradient of the head's sink.
  double load_softmax(const Scratch& x, int64_t b, int64_t h, int64_t first, int64_t queries) const {
    double grad_sink = 0;
    for (int s = 0; s < p_.streams(); ++s) {
      const int64_t row = ((b * p_.H + h) * p_.streams() + s) * p_.I + first;
      const auto* lse = static_cast<const acc_t*>(a_.lse) + row;
      const auto* grad_lse = a_.grad_lse == nullptr ? nullptr : static_cast<const acc_t*>(a_.grad_lse) + row;
      for (int64_t i = 0; i < width_; ++i) {
        const bool sees = i < queries && lse[i] > -std::numeric_limits<acc_t>::infinity();
        if (!sees) {
          x.lse[s][i] = std::numeric_limits<acc_t>::infinity();  // so that every power is 0
          x.delta[s][i] = 0;
          continue;
        }
        x.lse[s][i] = static_cast<acc_t>(lse[i] * Power::kUnit);
        x.delta[s][i] = delta(b, h, first + i, s) - (grad_lse == nullptr ? acc_t(0) : grad_lse[i]);
        if (p_.sinks != nullptr) {  // a sink's gradient is a score's, with no value to be multiplied
          grad_sink -= std::exp(p_.sinks[h] - static_cast<double>(lse[i])) * x.delta[s][i];
        }
      }
    }
    return grad_sink;
  }

  // dO · the stream's own output.
  acc_t delta(int64_t b, int64_t h, int64_t i, int s) const {
    const scalar_t* grad = a_.grad_out.template at<scalar_t>(b, h, i);
    const scalar_t* out = a_.out.template at<scalar_t>(b, h, i);
    const scalar_t* other = p_.streams() == 2 ? a_.stream_out.template at<scalar_t>(b, h, i) : nullptr;
    constexpr int64_t lanes = 16;  // sums side by side, for the compiler to put into a register
    acc_t sums[lanes] = {};
    for (int64_t d0 = 0; d0 < p_.D; d0 += lanes) {
      const int64_t n = std::min(lanes, p_.D - d0);
      for (int64_t d = 0; d < n; ++d) {
        acc_t share = static_cast<acc_t>(s == 0 && other != nullptr ? other[d0 + d] : out[d0 + d]);
        if (s == 1) {
          share -= static_cast<acc_t>(other[d0 + d]);
        }
        sums[d] += static_cast<acc_t>(grad[d0 + d]) * share;
      }
    }
    return std::accumulate(sums, sums + lanes, acc_t(0));
  }

  // Fills in the cover of a tile; false where it is empty.
  bool look(TileCover& cover, int64_t b, int64_t first_group, int64_t groups, int64_t t) const {
    const int64_t tile_blocks = height_ / kBlock, first_block = t * tile_blocks;
    const int64_t count = std::min(tile_blocks, blocks_.key_blocks() - first_block);
    const int per_stream = p_.separate ? 1 : p_.ranges;
    std::fill(cover.seen_by, cover.seen_by + kMaxBlocks, Blocks{});
    bool any = false;
    for (int64_t group = 0; group < groups; ++group) {
      cover.seen[group] = {};
      for (int64_t i = 0; i < count; ++i) {
        bool seen = false;
        for (int s = 0; s < p_.streams(); ++s) {
          cover.covers[group][s][i] = blocks_.cover(b, first_group + group, first_block + i, s, per_stream);
          seen |= cover.covers[group][s][i] != Cover::empty;
        }
        cover.any[group][i] = seen;
        if (seen) {
          cover.seen[group] = cover.seen[group].with({i, i + 1});
          cover.seen_by[i] = cover.seen_by[i].with({group, group + 1});
          any = true;
        }
      }
    }
    return any;
  }

  void key_tile(const Scratch& x, const TileCover& cover, int64_t b, int64_t first_group, int64_t groups,
                int64_t t, bool* started) const {
    const int64_t tile_blocks = height_ / kBlock, tile = t * height_ * depth_;
    for (int64_t group = 0; group < groups; ++group) {
      const Blocks seen = cover.seen[group];
      for (int64_t i = 0; i < tile_blocks; ++i) {
        const bool others_see = cover.seen_by[i].begin <= group && group < cover.seen_by[i].end;
        if (others_see && (i < seen.begin || i >= seen.end)) {  // block() clears those in between
          clear(x.p, i, group);
          clear(x.ds, i, group);
        }
      }
      if (seen.empty()) {
        continue;
      }
      const int64_t row = seen.begin * kBlock, rows = (seen.end - seen.begin) * kBlock,
                    at = group * kBlock * depth_;
      Gemm::multiply({rows, kBlock, depth_, x.k.from(tile + row * depth_), x.q_t.from(at),
                      x.scores + row * kBlock, kBlock, false});
      Gemm::multiply({rows, kBlock, depth_, x.v.from(tile + row * depth_), x.do_t.from(at),
                      x.dp + row * kBlock, kBlock, false});
      scores_.prepare(x.scores + row * kBlock, rows * kBlock);
      const Operand<op_t> ds_b = Gemm::kVnni == 2 ? x.ds_b : x.ds.from(group * kBlock);
      for (int64_t i = seen.begin; i < seen.end; ++i) {
        block(x, cover, b, first_group, group, t * tile_blocks, i, ds_b);
      }
      acc_t* dq_t = x.dq_t + at;
      Gemm::multiply({depth_, kBlock, rows, x.k_t.from(tile + row), ds_b.from(row * ds_b.ld), dq_t, kBlock,
                      started[group]});
      started[group] = true;
    }
    // Rows of blocks that are seen by the same groups make one product.
    for (int64_t i = 0, end = 0; i < tile_blocks; i = end) {
      const Blocks by = cover.seen_by[i];
      for (end = i + 1;
           end < tile_blocks && cover.seen_by[end].begin == by.begin && cover.seen_by[end].end == by.end;) {
        ++end;
      }
      if (by.empty()) {
        continue;
      }
      const int64_t rows = (end - i) * kBlock, queries = (by.end - by.begin) * kBlock;
      const int64_t left = i * kBlock * width_ + by.begin * kBlock, right = by.begin * kBlock * depth_;
      const int64_t at = tile + i * kBlock * depth_;
      Gemm::multiply({rows, depth_, queries, x.p.from(left), x.grad.from(right), x.dv + at, depth_, true});
      Gemm::multiply({rows, depth_, queries, x.ds.from(left), x.q.from(right), x.dk + at, depth_, true});
    }
  }

  void clear(const Operand<op_t>& tile, int64_t i, int64_t group) const {
    for (int64_t plane = 0; plane < Gemm::kPlanes; ++plane) {
      for (int64_t j = i * kBlock; j < (i + 1) * kBlock; ++j) {
        op_t* row = tile.data + plane * tile.plane + j * tile.ld + group * kBlock;
        std::fill(row, row + kBlock, op_t(0));
      }
    }
  }

  // Pᵀ and dSᵀ of a block, from Sᵀ and dPᵀ.
  void block(const Scratch& x, const TileCover& cover, int64_t b, int64_t first_group, int64_t group,
             int64_t first_block, int64_t i, const Operand<op_t>& ds_b) const {
    const int per_stream = p_.separate ? 1 : p_.ranges;
    const int64_t at = i * kBlock * kBlock;
    const acc_t *source[kMaxRanges], *lse[kMaxRanges], *delta[kMaxRanges];
    int count = 0;
    for (int s = 0; s < p_.streams(); ++s) {
      const Cover of_stream = cover.covers[group][s][i];
      if (of_stream == Cover::empty) {
        continue;
      }
      source[count] = x.scores + at;
      if (of_stream == Cover::partial) {
        std::copy(x.scores + at, x.scores + at + kBlock * kBlock, x.masked[s] + at);
        blocks_.hide(x.masked[s] + at, b, first_group + group, first_block + i, s, per_stream);
        source[count] = x.masked[s] + at;
      }
      lse[count] = x.lse[s] + group * kBlock;
      delta[count] = x.delta[s] + group * kBlock;
      ++count;
    }
    const int64_t row = i * kBlock, column = group * kBlock;
    if (count == 0) {
      clear(x.p, i, group);
      clear(x.ds, i, group);
      for (int64_t j = 0; Gemm::kVnni == 2 && j < kBlock; j += 2) {
        for (int v = 0; v < kVecs; ++v) {
          store_b_pair<Gemm>(ds_b, row + j, v * V::size(), V(acc_t(0)), V(acc_t(0)));
        }
      }
    } else if (count == 1) {
      differentiate<1>(x, source, x.dp + at, lse, delta, row, column, ds_b);
    } else {
      differentiate<2>(x, source, x.dp + at, lse, delta, row, column, ds_b);
    }
  }

  // P = exp(s − lse), dS = P·(dP − delta), summed over the streams that see the block, each with its own.
  template <int count>
  void differentiate(const Scratch& x, const acc_t* const* source, const acc_t* dp, const acc_t* const* lse,
                     const acc_t* const* delta, int64_t row, int64_t column,
                     const Operand<op_t>& ds_b) const {
    const V factor(scores_.factor), one(acc_t(1)), cap(scores_.cap), lowest(-scores_.cap);
    for (int v0 = 0; v0 < kVecs; v0 += 2) {
      const int64_t lane = v0 * V::size();
      V of_lse[count][2], of_delta[count][2];
      for (int s = 0; s < count; ++s) {
        for (int v = 0; v < 2; ++v) {
          of_lse[s][v] = V::loadu(lse[s] + lane + v * V::size());
          of_delta[s][v] = V::loadu(delta[s] + lane + v * V::size());
        }
      }
      for (int64_t j = 0; j < kBlock; j += 2) {
        V ds[2][2];
        for (int64_t odd = 0; odd < 2; ++odd) {
          V p[2];
          for (int v = 0; v < 2; ++v) {
            const int64_t at = (j + odd) * kBlock + lane + v * V::size();
            const V dp_v = V::loadu(dp + at);
            for (int s = 0; s < count; ++s) {
              const V score = V::loadu(source[s] + at);
              const V probability = Power::power(score, factor, of_lse[s][v]);
              V gradient = probability * (dp_v - of_delta[s][v]);
              if (scores_.capped) {  // the slope of the cap, 1 − tanh²; a hidden score is −inf
                const V bent = at::vec::clamp_min(score, lowest) / cap;
                gradient = gradient * (one - bent * bent);
              }
              p[v] = s == 0 ? probability : p[v] + probability;
              ds[odd][v] = s == 0 ? gradient : ds[odd][v] + gradient;
            }
          }
          store_a_row<Gemm>(x.p, row + j + odd, column + lane, p[0], p[1]);
          store_a_row<Gemm>(x.ds, row + j + odd, column + lane, ds[odd][0], ds[odd][1]);
        }
        if constexpr (Gemm::kVnni == 2) {
          for (int v = 0; v < 2; ++v) {
            store_b_pair<Gemm>(ds_b, row + j, lane + v * V::size(), ds[0][v], ds[1][v]);
          }
        }
      }
    }
  }

  void add_parts(acc_t* partials) const {
    const int64_t size = 2 * keys_ * depth_;
    run_tasks(p_.B * p_.G * key_tiles_, parts_ * height_ * depth_, [&](TaskQueue& queue) {
      for (int64_t task = queue.next(); task >= 0; task = queue.next()) {
        const int64_t head = task / key_tiles_, first = task % key_tiles_ * height_;
        acc_t* sum = partials + head * parts_ * size;
        for (int64_t kind = 0; kind < 2; ++kind) {
          acc_t* to = sum + kind * keys_ * depth_ + first * depth_;
          for (int64_t part = 1; part < parts_; ++part) {
            for (int64_t i = 0; i < height_ * depth_; ++i) {
              to[i] += to[part * size + i];
            }
          }
        }
        store_keys_and_values(head / p_.G, head % p_.G, sum, sum + keys_ * depth_, first,
                              std::min(first + height_, p_.J));
      }
    });
  }

  void store_keys_and_values(int64_t b, int64_t g, const acc_t* sum_k, const acc_t* sum_v, int64_t begin,
                             int64_t end) const {
    for (int64_t j = begin; j < end; ++j) {
      store_row(a_.grad_k.template at<scalar_t>(b, g, j), a_.grad_k.dim, sum_k + j * depth_,
                static_cast<acc_t>(p_.scale));
      store_row(a_.grad_v.template at<scalar_t>(b, g, j), a_.grad_v.dim, sum_v + j * depth_, acc_t(1));
    }
  }

  void store_row(scalar_t* to, int64_t stride, const acc_t* from, acc_t scale) const {
    for (int64_t d = 0; d < p_.D && stride == 1; ++d) {
      to[d] = static_cast<scalar_t>(from[d] * scale);
    }
    for (int64_t d = 0; d < p_.D && stride != 1; ++d) {
      to[d * stride] = static_cast<scalar_t>(from[d] * scale);
    }
  }

  const SpanBackward& a_;
  const SpanProblem& p_;
  SpanBlocks blocks_;
  Power scores_;
  int64_t width_, height_, query_tiles_, key_tiles_, depth_, keys_, parts_;
};

}  // namespace

void span_attention_backward(const SpanBackward& args) {
  with_engine(args.problem.dtype,
              [&](auto scalar, auto engine) { Backward<decltype(scalar), decltype(engine)>(args).run(); });
}

}  // namespace pyvlm::CPU_CAPABILITY
