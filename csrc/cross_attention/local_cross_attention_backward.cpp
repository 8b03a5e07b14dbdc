// The backward of attention to windows. A key belongs to the window of one query: its gradients are written
// once, where they are computed, and nothing is summed over threads.
#include "cross_attention/local_windows.h"

namespace pyvlm::CPU_CAPABILITY {
namespace {

template <typename scalar_t>
class Backward {
 public:
  explicit Backward(const LocalAttentionBackward& args)
      : a_(args), p_(args.problem), heads_(p_), streams_(can_stream(p_)) {}

  void run() const {
    each_query_block<Scratch>(p_, 5, [this](const Scratch& x, int64_t n, int64_t first, int64_t count) {
      // One behind the other, so that a query's loads can look ahead to the next query.
      int64_t ends[kTaskQueries], keys = 0;
      for (int64_t i = 0; i < count; ++i) {
        each_key(p_, n, first + i, [&](const Key& key, bool visible) {
          if (visible) {
            x.keys[keys++] = key;
          } else {
            heads_.zero(token_of<scalar_t>(p_.maps[key.map].grad_key, n, key.token));
            heads_.zero(token_of<scalar_t>(p_.maps[key.map].grad_value, n, key.token));
          }
        });
        ends[i] = keys;
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t begin = i == 0 ? 0 : ends[i - 1];
        propagate(x, n, first + i, x.keys + begin, ends[i] - begin, keys - ends[i]);
      }
      if (streams_) {
        end_streams();
      }
    });
  }

 private:
  using acc_t = typename Heads<scalar_t>::acc_t;
  using V = Vec<acc_t>;
  static constexpr int64_t kAhead = 4;  // keys

  struct Scratch {
    Scratch(Arena& arena, const LocalAttention& p)
        : keys(arena.take<Key>(kTaskQueries * p.window)),
          query(arena.take<acc_t>(p.A * Heads<scalar_t>(p).width())),
          grad_out(arena.take<acc_t>(p.A * Heads<scalar_t>(p).width())),
          grad_query(arena.take<acc_t>(p.A * Heads<scalar_t>(p).width())),
          score(arena.take<acc_t>(round_up(kept(p) * p.A, kProducts))),
          grad_score(arena.take<acc_t>(round_up(kept(p) * p.A, kProducts))),
          products(arena.take<acc_t>(kProducts * V::size())),
          lse(arena.take<acc_t>(p.A)),
          delta(arena.take<acc_t>(round_up(p.A, kProducts))),
          ones(arena.take<acc_t>(p.A)) {}
    Key* keys;
    acc_t *query, *grad_out, *grad_query;  // [A, width]
    acc_t *score, *grad_score;             // [kept, A]
    acc_t* products;
    acc_t *lse, *delta, *ones;  // [A]
  };

  // Whether gradients go past the caches. They are too large to be found there again, and writing them
  // through the caches would read what they overwrite: a backward of 180 to 360 MB took a fourth longer.
  static bool can_stream(const LocalAttention& p) {
    constexpr int64_t kLarge = 32 << 20, kAlign = 64;
    const auto aligned = [](const HeadRows& rows) {
      return reinterpret_cast<uintptr_t>(rows.data) % kAlign == 0;
    };
    const int64_t row_bytes = p.D * static_cast<int64_t>(sizeof(scalar_t));
    return 2 * p.N * p.Q * p.window * p.A * row_bytes >= kLarge && row_bytes % kAlign == 0 &&
           p.D % Heads<scalar_t>::kStep == 0 &&
           std::all_of(p.maps.begin(), p.maps.end(),
                       [&](const LocalMap& map) { return aligned(map.grad_key) && aligned(map.grad_value); });
  }

  // Keys that are worked on together, and stay in L1: as few as fill the vectors of products.
  static int64_t kept(const LocalAttention& p) { return (kProducts + p.A - 1) / std::max<int64_t>(p.A, 1); }

  // `following`: the keys behind these, of the next queries.
  void propagate(const Scratch& x, int64_t n, int64_t query, const Key* keys, int64_t count,
                 int64_t following) const {
    const auto none = [](int64_t) { return Token<scalar_t>(); };
    heads_.load(x.query, token_of<scalar_t>(p_.query, n, query));
    heads_.load(x.grad_out, token_of<scalar_t>(a_.grad_out, n, query));
    heads_.dots(
        x.delta, x.products, x.grad_out, 1, [&](int64_t) { return token_of<scalar_t>(p_.out, n, query); },
        none);
    for (int64_t a = 0; a < p_.A; ++a) {
      x.lse[a] = static_cast<const acc_t*>(p_.lse)[(n * p_.A + a) * p_.Q + query];
      x.ones[a] = acc_t(1);
    }
    std::fill(x.grad_query, x.grad_query + p_.A * heads_.width(), acc_t(0));
    const int64_t step = kept(p_);
    for (int64_t first = 0; first < count; first += step) {
      const int64_t number = std::min(step, count - first);
      const auto ahead = [&](int64_t j, HeadRows LocalMap::* tensor) {
        const int64_t next = first + j + kAhead;
        return next < count + following
                   ? token_of<scalar_t>(p_.maps[keys[next].map].*tensor, n, keys[next].token)
                   : Token<scalar_t>();
      };
      const auto token = [&](int64_t j, HeadRows LocalMap::* tensor) {
        return token_of<scalar_t>(p_.maps[keys[first + j].map].*tensor, n, keys[first + j].token);
      };
      const auto dots = [&](acc_t* out, const acc_t* rows, HeadRows LocalMap::* tensor) {
        heads_.dots(
            out, x.products, rows, number, [&](int64_t j) { return token(j, tensor); },
            [&](int64_t j) { return ahead(j, tensor); });
      };
      dots(x.score, x.query, &LocalMap::key);
      dots(x.grad_score, x.grad_out, &LocalMap::value);
      weigh(x, number);
      for (int64_t j = 0; j < number; ++j) {
        const acc_t *weight = x.score + j * p_.A, *grad_score = x.grad_score + j * p_.A;
        if (streams_) {
          heads_.template store<true>(token(j, &LocalMap::grad_value), x.grad_out, weight);
          heads_.template store<true>(token(j, &LocalMap::grad_key), x.query, grad_score);
        } else {
          heads_.store(token(j, &LocalMap::grad_value), x.grad_out, weight);
          heads_.store(token(j, &LocalMap::grad_key), x.query, grad_score);
        }
        heads_.add(x.grad_query, grad_score, token(j, &LocalMap::key), {});
      }
    }
    heads_.store(token_of<scalar_t>(a_.grad_query, n, query), x.grad_query, x.ones);
  }

  // Products q · k and dout · v into weights and gradients of q · k. Heads lie in the lanes.
  void weigh(const Scratch& x, int64_t count) const {
    constexpr double kLog2e = 1.4426950408889634074;
    const V scale(static_cast<acc_t>(p_.scale)), log2e(static_cast<acc_t>(kLog2e));
    for (int64_t a = 0; a < p_.A; a += V::size()) {
      const int64_t lanes = std::min<int64_t>(V::size(), p_.A - a);
      const V lse = V::loadu(x.lse + a, lanes), delta = V::loadu(x.delta + a, lanes);
      for (int64_t j = 0; j < count; ++j) {
        acc_t *score = x.score + j * p_.A + a, *grad_score = x.grad_score + j * p_.A + a;
        const V exponent = at::vec::fmsub(V::loadu(score, lanes), scale, lse) * log2e;
        const V weight = exp2<kPrecisionOf<scalar_t>>(exponent);
        weight.store(score, lanes);
        (weight * (V::loadu(grad_score, lanes) - delta) * scale).store(grad_score, lanes);
      }
    }
  }

  const LocalAttentionBackward& a_;
  const LocalAttention& p_;
  Heads<scalar_t> heads_;
  bool streams_;
};

}  // namespace

void local_cross_attention_backward(const LocalAttentionBackward& args) {
  with_scalar(args.problem.dtype, [&](auto scalar) { Backward<decltype(scalar)>(args).run(); });
}

}  // namespace pyvlm::CPU_CAPABILITY
