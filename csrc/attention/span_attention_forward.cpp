// The forward: one task a (batch, head, query tile) walks the key tiles that its queries see, with a running
// maximum.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <cmath>

#include "attention/span_tiles.h"
#include "common/arena.h"
#include "common/tile_gemm.h"

namespace pyvlm::CPU_CAPABILITY {
namespace {

template <typename scalar_t, typename op_t>
class Forward {
 public:
  explicit Forward(const SpanForward& args)
      : a_(args), p_(args.problem), tiles_(p_), width_(tiles_.width()), height_(tiles_.height()) {}

  void run() {
    pack_keys_and_values();
    const int64_t query_tiles = tiles_.query_tiles(), tasks = p_.B * p_.H * query_tiles;
    Arena size;
    Scratch(size, *this);
    at::parallel_for(0, tasks, task_grain(width_ * p_.J * p_.D), [&](int64_t begin, int64_t end) {
      const ThreadScratch memory(size.used());
      Arena arena = memory.arena();
      const Scratch scratch(arena, *this);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / (p_.H * query_tiles), h = task / query_tiles % p_.H;
        attend(scratch, b, h, task % query_tiles);
      }
      tile_gemm_release<op_t>();
    });
  }

 private:
  using acc_t = acc_type<scalar_t>;
  using Vec = at::vec::Vectorized<acc_t>;
  static constexpr bool kWidened = !std::is_same_v<scalar_t, op_t>;

  struct Scratch {
    op_t* q_t;      // [D, width], B operand
    acc_t* scores;  // [keys, width]
    op_t* p_t;      // [keys, width], B operand
    acc_t* rescale;
    acc_t* o_t[kMaxRanges];  // [D, width] a stream, not yet divided by the sum
    acc_t* top[kMaxRanges];
    acc_t* sum[kMaxRanges];
    TileStream<acc_t>* streams;

    Scratch(Arena& arena, const Forward& f) {
      const int64_t width = f.width_, tile = round_up(f.height_, 2) * width;
      q_t = arena.take<op_t>(f.p_.D * width);
      scores = arena.take<acc_t>(tile);
      p_t = arena.take<op_t>(tile);
      rescale = arena.take<acc_t>(width);
      for (int s = 0; s < f.p_.streams(); ++s) {
        o_t[s] = arena.take<acc_t>(f.p_.D * width);
        top[s] = arena.take<acc_t>(width);
        sum[s] = arena.take<acc_t>(width);
      }
      streams = arena.take<TileStream<acc_t>>(kMaxRanges);
    }
  };

  // Vᵀ a key tile as an A operand, and K where it must be widened: once for all the queries and heads of a
  // group.
  void pack_keys_and_values() {
    const int64_t tile = height_ * p_.D, count = p_.B * p_.G * tiles_.key_tiles();
    const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<op_t>::value);
    values_ = at::empty({count * tile}, options);
    if (kWidened) {
      keys_ = at::empty({count * tile}, options);
    }
    op_t* values = values_.template mutable_data_ptr<op_t>();
    op_t* keys = kWidened ? keys_.template mutable_data_ptr<op_t>() : nullptr;
    at::parallel_for(0, count, task_grain(tile), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t t = i % tiles_.key_tiles(), g = i / tiles_.key_tiles() % p_.G,
                      b = i / tiles_.key_tiles() / p_.G;
        const int64_t rows = std::min(height_, p_.J - t * height_);
        pack_a_transposed(values + i * tile, a_.v.template at<scalar_t>(b, g, t * height_), a_.v.token, rows,
                          p_.D, height_);
        if (kWidened) {
          pack_a(keys + i * tile, a_.k.template at<scalar_t>(b, g, t * height_), a_.k.token, rows, p_.D);
        }
      }
    });
  }

  void attend(const Scratch& x, int64_t b, int64_t h, int64_t query_tile) {
    const int64_t first = query_tile * width_, queries = std::min(width_, p_.I - first),
                  g = h / (p_.H / p_.G);
    const int streams = p_.streams();
    bool started[kMaxRanges] = {};
    for (int s = 0; s < streams; ++s) {
      std::fill(x.top[s], x.top[s] + width_, -std::numeric_limits<acc_t>::infinity());
      std::fill(x.sum[s], x.sum[s] + width_, acc_t(0));
    }
    pack_b_transposed(x.q_t, a_.q.template at<scalar_t>(b, h, first), a_.q.token, queries, p_.D, width_);
    for (int64_t t = 0; t < tiles_.key_tiles(); ++t) {
      bool any = false;
      for (int s = 0; s < streams; ++s) {
        x.streams[s].load(p_, tiles_, b, query_tile, t, s);
        any |= x.streams[s].cover != Cover::empty;
      }
      if (!any) {
        continue;
      }
      const int64_t n = std::min(height_, p_.J - t * height_);
      const int64_t packed = ((b * p_.G + g) * tiles_.key_tiles() + t) * height_ * p_.D;
      if constexpr (kWidened) {
        tile_gemm(n, width_, p_.D, keys_.template const_data_ptr<op_t>() + packed, p_.D, x.q_t, width_,
                  x.scores, width_, false);
      } else {
        tile_gemm(n, width_, p_.D, a_.k.template at<op_t>(b, g, t * height_), a_.k.token, x.q_t, width_,
                  x.scores, width_, false);
      }
      if (p_.softcap != 0) {
        cap_scores(x.scores, n * width_, p_.scale, p_.softcap);
      }
      const op_t* v_t = values_.template const_data_ptr<op_t>() + packed;
      for (int s = 0; s < streams; ++s) {
        if (x.streams[s].cover == Cover::empty) {
          continue;
        }
        const bool grew = exponentiate(x, s, p_.key_class + b * p_.J + t * height_, n);
        if (started[s] && grew) {
          rescale_rows(x.o_t[s], x.rescale);
        }
        tile_gemm(p_.D, width_, round_up(n, kVnni<op_t>), v_t, height_, x.p_t, width_, x.o_t[s], width_,
                  started[s]);
        started[s] = true;
      }
    }
    finish(x, b, h, first, queries, started);
  }

  // Turns the tile's scores into probabilities of stream s against its running maximum, and updates maximum
  // and sum. Returns whether any maximum grew: then what was summed before must be rescaled.
  bool exponentiate(const Scratch& x, int s, const uint8_t* key_class, int64_t n) {
    const TileStream<acc_t>& stream = x.streams[s];
    const Vec scale(static_cast<acc_t>(p_.softcap == 0 ? p_.scale : 1)), zero(acc_t(0));
    const Vec lowest(-std::numeric_limits<acc_t>::infinity());
    bool grew = false;
    for (int64_t lane = 0; lane < width_; lane += 2 * Vec::size()) {
      Vec top[2] = {lowest, lowest};
      for (int64_t j = 0; j < n; ++j) {
        const Cover cover = stream.row_cover(j, key_class[j], lane);
        for (int v = 0; v < 2 && cover != Cover::empty; ++v) {
          const int64_t column = lane + v * Vec::size();
          Vec score = Vec::loadu(x.scores + j * width_ + column) * scale;
          if (cover == Cover::partial) {
            score = Vec::blendv(lowest, score, stream.visible(j, key_class[j], column));
          }
          top[v] = at::vec::clamp_min(score, top[v]);
        }
      }
      Vec base[2], sum[2];
      for (int v = 0; v < 2; ++v) {
        const int64_t column = lane + v * Vec::size();
        const Vec old = Vec::loadu(x.top[s] + column);
        top[v] = at::vec::clamp_min(top[v], old);
        // Where nothing was seen yet, -inf - (-inf) must not be made.
        base[v] = Vec::blendv(top[v], zero, top[v] == lowest);
        const Vec factor = exp_of(old - base[v]);
        grew |= (old < top[v]).zero_mask() != kAllLanes;
        factor.store(x.rescale + column);
        top[v].store(x.top[s] + column);
        sum[v] = Vec::loadu(x.sum[s] + column) * factor;
      }
      for (int64_t j = 0; j < n; j += 2) {
        Vec p[2][2] = {{zero, zero}, {zero, zero}};
        for (int64_t row = j; row < std::min(j + 2, n); ++row) {
          const Cover cover = stream.row_cover(row, key_class[row], lane);
          for (int v = 0; v < 2 && cover != Cover::empty; ++v) {
            const int64_t column = lane + v * Vec::size();
            Vec& probability = p[row - j][v];
            probability =
                exp_of(at::vec::fmsub(Vec::loadu(x.scores + row * width_ + column), scale, base[v]));
            if (cover == Cover::partial) {
              probability = Vec::blendv(zero, probability, stream.visible(row, key_class[row], column));
            }
            sum[v] = sum[v] + probability;
          }
        }
        store_b_rows(x.p_t + j * width_, lane, width_, p[0], p[1]);
      }
      sum[0].store(x.sum[s] + lane);
      sum[1].store(x.sum[s] + lane + Vec::size());
    }
    return grew;
  }

  void rescale_rows(acc_t* o_t, const acc_t* factor) const {
    for (int64_t d = 0; d < p_.D; ++d) {
      for (int64_t c = 0; c < width_; ++c) {
        o_t[d * width_ + c] *= factor[c];
      }
    }
  }

  void finish(const Scratch& x, int64_t b, int64_t h, int64_t first, int64_t queries, const bool* started) {
    const int streams = p_.streams();
    acc_t* lse = static_cast<acc_t*>(a_.lse) + (b * p_.H + h) * streams * p_.I + first;
    for (int s = 0; s < streams; ++s) {
      for (int64_t c = 0; c < width_; ++c) {
        x.rescale[c] = x.sum[s][c] > 0 ? 1 / x.sum[s][c] : acc_t(0);
      }
      for (int64_t c = 0; c < queries; ++c) {
        lse[s * p_.I + c] = x.top[s][c] + std::log(x.sum[s][c]);  // -inf + -inf where nothing was seen
      }
      if (started[s]) {
        rescale_rows(x.o_t[s], x.rescale);
      } else {
        std::fill(x.o_t[s], x.o_t[s] + p_.D * width_, acc_t(0));
      }
    }
    if (streams == 2) {
      store(a_.stream_out, x.o_t[0], b, h, first, queries);
      for (int64_t i = 0; i < p_.D * width_; ++i) {
        x.o_t[0][i] += x.o_t[1][i];
      }
    }
    store(a_.out, x.o_t[0], b, h, first, queries);
  }

  void store(const Strided& out, const acc_t* o_t, int64_t b, int64_t h, int64_t first,
             int64_t queries) const {
    store_transposed(out.template at<scalar_t>(b, h, first), out.token, out.dim, o_t, width_, queries, p_.D,
                     acc_t(1));
  }

  static constexpr int kAllLanes = (1 << Vec::size()) - 1;

  const SpanForward& a_;
  const SpanProblem& p_;
  SpanTiles tiles_;
  int64_t width_, height_;
  at::Tensor values_, keys_;
};

}  // namespace

void span_attention_forward(const SpanForward& args) {
  switch (args.problem.dtype) {
    case at::kDouble:
      return Forward<double, double>(args).run();
    case at::kFloat:
      return Forward<float, float>(args).run();
    case at::kHalf:
      return Forward<at::Half, float>(args).run();
    default:
      // A pair of bf16 is one step of the microkernel, so an odd head_dim is widened too.
      if (has_bf16_dot() && args.problem.D % 2 == 0) {
        return Forward<at::BFloat16, at::BFloat16>(args).run();
      }
      return Forward<at::BFloat16, float>(args).run();
  }
}

}  // namespace pyvlm::CPU_CAPABILITY
