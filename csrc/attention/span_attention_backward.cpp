// The backward: one task a (batch, key/value head) makes dK and dV of that head and dQ of its query heads in
// one pass, five GEMMs a tile. No two tasks write the same place and the order of every sum is fixed:
// deterministic by construction.
#include <ATen/Parallel.h>

#include "attention/span_tiles.h"
#include "common/arena.h"
#include "common/tile_gemm.h"

namespace pyvlm::CPU_CAPABILITY {
namespace {

template <typename scalar_t, typename op_t>
class Backward {
 public:
  explicit Backward(const SpanBackward& args)
      : a_(args), p_(args.problem), tiles_(p_), width_(tiles_.width()), height_(tiles_.height()) {}

  void run() {
    Arena size;
    Scratch(size, *this);
    at::parallel_for(0, p_.B * p_.G, task_grain(p_.H / p_.G * p_.I * p_.J * p_.D),
                     [&](int64_t begin, int64_t end) {
                       const ThreadScratch memory(size.used());
                       Arena arena = memory.arena();
                       const Scratch scratch(arena, *this);
                       for (int64_t task = begin; task < end; ++task) {
                         differentiate(scratch, task / p_.G, task % p_.G);
                       }
                       tile_gemm_release<op_t>();
                     });
  }

 private:
  using acc_t = acc_type<scalar_t>;
  using Vec = at::vec::Vectorized<acc_t>;
  static constexpr bool kWidened = !std::is_same_v<scalar_t, op_t>;

  struct Scratch {
    // Of one query head, a query tile after another.
    op_t *q_t, *do_t;  // [D, width], B operands
    op_t *q, *grad;    // [width, D], B operands
    acc_t* dq_t;       // [D, width]
    acc_t *lse[kMaxRanges], *delta[kMaxRanges];
    // Of the key/value head.
    acc_t *dk, *dv;  // [J, D]
    // Of one tile.
    op_t *k, *v;          // [keys, D], where they must be widened
    op_t* k_t;            // [D, keys], A operand
    acc_t *scores, *dp;   // [keys, width]
    op_t *p, *ds, *ds_b;  // [keys, width], A operands; dS as B operand
    TileStream<acc_t>* streams;

    Scratch(Arena& arena, const Backward& f) {
      const int64_t width = f.width_, padded = f.tiles_.query_tiles() * width, D = f.p_.D,
                    height = round_up(f.height_, 2), tile = height * width;
      q_t = arena.take<op_t>(padded * D);
      do_t = arena.take<op_t>(padded * D);
      q = arena.take<op_t>(padded * D);
      grad = arena.take<op_t>(padded * D);
      dq_t = arena.take<acc_t>(padded * D);
      for (int s = 0; s < f.p_.streams(); ++s) {
        lse[s] = arena.take<acc_t>(padded);
        delta[s] = arena.take<acc_t>(padded);
      }
      dk = arena.take<acc_t>(f.p_.J * D);
      dv = arena.take<acc_t>(f.p_.J * D);
      k = arena.take<op_t>(kWidened ? height * D : 0);
      v = arena.take<op_t>(kWidened ? height * D : 0);
      k_t = arena.take<op_t>(height * D);
      scores = arena.take<acc_t>(tile);
      dp = arena.take<acc_t>(tile);
      p = arena.take<op_t>(tile);
      ds = arena.take<op_t>(tile);
      ds_b = kVnni<op_t> == 1 ? ds : arena.take<op_t>(tile);
      streams = arena.take<TileStream<acc_t>>(kMaxRanges);
    }
  };

  void differentiate(const Scratch& x, int64_t b, int64_t g) {
    const int64_t group = p_.H / p_.G;
    std::fill(x.dk, x.dk + p_.J * p_.D, acc_t(0));
    std::fill(x.dv, x.dv + p_.J * p_.D, acc_t(0));
    for (int64_t h = g * group; h < (g + 1) * group; ++h) {
      load_head(x, b, h);
      for (int64_t t = 0; t < tiles_.key_tiles(); ++t) {
        key_tile(x, b, g, t);
      }
      store_head(x, b, h);
    }
    const auto scale = static_cast<acc_t>(p_.scale);
    for (int64_t j = 0; j < p_.J; ++j) {
      scalar_t* dk = a_.grad_k.template at<scalar_t>(b, g, j);
      scalar_t* dv = a_.grad_v.template at<scalar_t>(b, g, j);
      for (int64_t d = 0; d < p_.D; ++d) {
        dk[d * a_.grad_k.dim] = static_cast<scalar_t>(x.dk[j * p_.D + d] * scale);
        dv[d * a_.grad_v.dim] = static_cast<scalar_t>(x.dv[j * p_.D + d]);
      }
    }
  }

  void load_head(const Scratch& x, int64_t b, int64_t h) {
    for (int64_t t = 0; t < tiles_.query_tiles(); ++t) {
      const int64_t first = t * width_, rows = std::min(width_, p_.I - first), at = first * p_.D;
      const scalar_t* q = a_.q.template at<scalar_t>(b, h, first);
      const scalar_t* grad = a_.grad_out.template at<scalar_t>(b, h, first);
      pack_b_transposed(x.q_t + at, q, a_.q.token, rows, p_.D, width_);
      pack_b_transposed(x.do_t + at, grad, a_.grad_out.token, rows, p_.D, width_);
      pack_b(x.q + at, q, a_.q.token, rows, p_.D, width_);
      pack_b(x.grad + at, grad, a_.grad_out.token, rows, p_.D, width_);
    }
    const int64_t padded = tiles_.query_tiles() * width_;
    std::fill(x.dq_t, x.dq_t + padded * p_.D, acc_t(0));
    for (int s = 0; s < p_.streams(); ++s) {
      const int64_t row = ((b * p_.H + h) * p_.streams() + s) * p_.I;
      const auto* lse = static_cast<const acc_t*>(a_.lse) + row;
      const auto* grad_lse = a_.grad_lse == nullptr ? nullptr : static_cast<const acc_t*>(a_.grad_lse) + row;
      for (int64_t i = 0; i < padded; ++i) {
        const bool sees = i < p_.I && lse[i] > -std::numeric_limits<acc_t>::infinity();
        x.lse[s][i] = sees ? lse[i] : std::numeric_limits<acc_t>::infinity();  // so that every exp is 0
        x.delta[s][i] = sees ? delta(b, h, i, s) - (grad_lse == nullptr ? acc_t(0) : grad_lse[i]) : acc_t(0);
      }
    }
  }

  // dO · the stream's own output.
  acc_t delta(int64_t b, int64_t h, int64_t i, int s) const {
    const scalar_t* grad = a_.grad_out.template at<scalar_t>(b, h, i);
    const scalar_t* out = a_.out.template at<scalar_t>(b, h, i);
    const scalar_t* first = p_.streams() == 2 ? a_.stream_out.template at<scalar_t>(b, h, i) : out;
    acc_t sum = 0;
    for (int64_t d = 0; d < p_.D; ++d) {
      const acc_t share = static_cast<acc_t>(first[d]);
      sum += static_cast<acc_t>(grad[d]) * (s == 0 ? share : static_cast<acc_t>(out[d]) - share);
    }
    return sum;
  }

  void key_tile(const Scratch& x, int64_t b, int64_t g, int64_t t) {
    const int64_t begin = t * height_, n = std::min(height_, p_.J - begin), D = p_.D;
    const scalar_t* k_rows = a_.k.template at<scalar_t>(b, g, begin);
    const scalar_t* v_rows = a_.v.template at<scalar_t>(b, g, begin);
    bool packed = false;
    const op_t *k = nullptr, *v = nullptr;
    for (int64_t query_tile = 0; query_tile < tiles_.query_tiles(); ++query_tile) {
      bool any = false;
      for (int s = 0; s < p_.streams(); ++s) {
        x.streams[s].load(p_, tiles_, b, query_tile, t, s);
        any |= x.streams[s].cover != Cover::empty;
      }
      if (!any) {
        continue;
      }
      if (!packed) {
        packed = true;
        pack_a_transposed(x.k_t, k_rows, a_.k.token, n, D, height_);
        if constexpr (kWidened) {
          pack_a(x.k, k_rows, a_.k.token, n, D);
          pack_a(x.v, v_rows, a_.v.token, n, D);
          k = x.k;
          v = x.v;
        } else {
          k = k_rows;
          v = v_rows;
        }
      }
      const int64_t first = query_tile * width_, at = first * D;
      tile_gemm(n, width_, D, k, kWidened ? D : a_.k.token, x.q_t + at, width_, x.scores, width_, false);
      tile_gemm(n, width_, D, v, kWidened ? D : a_.v.token, x.do_t + at, width_, x.dp, width_, false);
      if (p_.softcap != 0) {
        cap_scores(x.scores, n * width_, p_.scale, p_.softcap);
      }
      score_gradients(x, first, p_.key_class + b * p_.J + begin, n);
      tile_gemm(n, D, width_, x.p, width_, x.grad + at, D, x.dv + begin * D, D, true);
      tile_gemm(n, D, width_, x.ds, width_, x.q + at, D, x.dk + begin * D, D, true);
      tile_gemm(D, width_, round_up(n, kVnni<op_t>), x.k_t, height_, x.ds_b, width_, x.dq_t + at, width_,
                true);
    }
  }

  // Pᵀ and dSᵀ of the tile, from Sᵀ and dPᵀ: P = exp(s − lse), dS = P·(dP − delta), each stream with its own.
  void score_gradients(const Scratch& x, int64_t first, const uint8_t* key_class, int64_t n) {
    const int streams = p_.streams();
    const bool capped = p_.softcap != 0;
    const Vec scale(static_cast<acc_t>(capped ? 1 : p_.scale)), zero(acc_t(0)), one(acc_t(1));
    const Vec cap(static_cast<acc_t>(p_.softcap));
    for (int64_t lane = 0; lane < width_; lane += 2 * Vec::size()) {
      Vec lse[kMaxRanges][2], delta[kMaxRanges][2];
      for (int s = 0; s < streams; ++s) {
        for (int v = 0; v < 2; ++v) {
          lse[s][v] = Vec::loadu(x.lse[s] + first + lane + v * Vec::size());
          delta[s][v] = Vec::loadu(x.delta[s] + first + lane + v * Vec::size());
        }
      }
      for (int64_t j = 0; j < n; j += 2) {
        Vec p[2][2] = {{zero, zero}, {zero, zero}}, ds[2][2] = {{zero, zero}, {zero, zero}};
        for (int64_t row = j; row < std::min(j + 2, n); ++row) {
          for (int s = 0; s < streams; ++s) {
            const TileStream<acc_t>& stream = x.streams[s];
            const Cover cover = stream.row_cover(row, key_class[row], lane);
            for (int v = 0; v < 2 && cover != Cover::empty; ++v) {
              const int64_t column = lane + v * Vec::size(), at = row * width_ + column;
              const Vec score = Vec::loadu(x.scores + at);
              Vec probability = exp_of(at::vec::fmsub(score, scale, lse[s][v]));
              if (cover == Cover::partial) {
                probability = Vec::blendv(zero, probability, stream.visible(row, key_class[row], column));
              }
              p[row - j][v] = p[row - j][v] + probability;
              Vec gradient = probability * (Vec::loadu(x.dp + at) - delta[s][v]);
              if (capped) {  // the slope of the cap: 1 − tanh²
                gradient = gradient * (one - (score / cap) * (score / cap));
              }
              ds[row - j][v] = ds[row - j][v] + gradient;
            }
          }
          store_a_row(x.p + row * width_ + lane, p[row - j][0], p[row - j][1]);
          store_a_row(x.ds + row * width_ + lane, ds[row - j][0], ds[row - j][1]);
        }
        if constexpr (kVnni<op_t> == 2) {
          store_b_rows(x.ds_b + j * width_, lane, width_, ds[0], ds[1]);
        }
      }
    }
  }

  void store_head(const Scratch& x, int64_t b, int64_t h) const {
    for (int64_t first = 0; first < p_.I; first += width_) {
      store_transposed(a_.grad_q.template at<scalar_t>(b, h, first), a_.grad_q.token, a_.grad_q.dim,
                       x.dq_t + first * p_.D, width_, std::min(width_, p_.I - first), p_.D,
                       static_cast<acc_t>(p_.scale));
    }
  }

  const SpanBackward& a_;
  const SpanProblem& p_;
  SpanTiles tiles_;
  int64_t width_, height_;
};

}  // namespace

void span_attention_backward(const SpanBackward& args) {
  switch (args.problem.dtype) {
    case at::kDouble:
      return Backward<double, double>(args).run();
    case at::kFloat:
      return Backward<float, float>(args).run();
    case at::kHalf:
      return Backward<at::Half, float>(args).run();
    default:
      if (has_bf16_dot() && args.problem.D % 2 == 0) {
        return Backward<at::BFloat16, at::BFloat16>(args).run();
      }
      return Backward<at::BFloat16, float>(args).run();
  }
}

}  // namespace pyvlm::CPU_CAPABILITY
