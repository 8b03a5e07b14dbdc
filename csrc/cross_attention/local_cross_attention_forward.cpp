// The forward of attention to windows. A task is a few queries of an image: the scores of all heads with the
// visible keys, one softmax over them, and the weighted sum of the values.
#include "cross_attention/local_windows.h"

namespace pyvlm::CPU_CAPABILITY {
namespace {

template <typename scalar_t>
class Forward {
 public:
  explicit Forward(const LocalAttention& p) : p_(p), heads_(p) {}

  void run() const {
    each_query_block<Scratch>(p_, 2, [this](const Scratch& x, int64_t n, int64_t first, int64_t count) {
      // One behind the other, so that a query's loads can look ahead to the next query.
      int64_t ends[kTaskQueries], keys = 0;
      for (int64_t i = 0; i < count; ++i) {
        each_key(p_, n, first + i, [&](const Key& key, bool visible) {
          if (visible) {
            x.keys[keys++] = key;
          }
        });
        ends[i] = keys;
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t begin = i == 0 ? 0 : ends[i - 1];
        attend(x, n, first + i, x.keys + begin, ends[i] - begin, keys - ends[i]);
      }
    });
  }

 private:
  using acc_t = typename Heads<scalar_t>::acc_t;
  using V = Vec<acc_t>;
  static constexpr acc_t kLowest = -std::numeric_limits<acc_t>::infinity();

  struct Scratch {
    Scratch(Arena& arena, const LocalAttention& p)
        : keys(arena.take<Key>(kTaskQueries * p.window)),
          query(arena.take<acc_t>(p.A * Heads<scalar_t>(p).width())),
          sum(arena.take<acc_t>(p.A * Heads<scalar_t>(p).width())),
          weights(arena.take<acc_t>(round_up(p.window * p.A, kProducts))),
          products(arena.take<acc_t>(kProducts * V::size())),
          share(arena.take<acc_t>(p.A)) {}
    Key* keys;
    acc_t *query, *sum;  // [A, width]
    acc_t* weights;      // [keys, A]
    acc_t* products;
    acc_t* share;  // [A]
  };

  // `following`: the keys behind these, of the next queries.
  void attend(const Scratch& x, int64_t n, int64_t query, const Key* keys, int64_t count,
              int64_t following) const {
    heads_.load(x.query, token_of<scalar_t>(p_.query, n, query));
    const auto key = [&](int64_t j) {
      return token_of<scalar_t>(p_.maps[keys[j].map].key, n, keys[j].token);
    };
    const auto value = [&](int64_t j) {
      return token_of<scalar_t>(p_.maps[keys[j].map].value, n, keys[j].token);
    };
    // While keys are read the values are asked for, and then the next query's keys.
    heads_.dots(x.weights, x.products, x.query, count, key, value);
    softmax(x, count, static_cast<acc_t*>(p_.lse) + n * p_.A * p_.Q + query);
    std::fill(x.sum, x.sum + p_.A * heads_.width(), acc_t(0));
    for (int64_t j = 0; j < count; ++j) {
      heads_.add(x.sum, x.weights + j * p_.A, value(j), j < following ? key(count + j) : Token<scalar_t>());
    }
    heads_.store(token_of<scalar_t>(p_.out, n, query), x.sum, x.share);
  }

  // Turns scores into powers over their largest; `share` is the inverse of their sums. Heads lie in the
  // lanes.
  void softmax(const Scratch& x, int64_t count, acc_t* lse) const {
    constexpr double kLog2e = 1.4426950408889634074;
    const V scale(static_cast<acc_t>(p_.scale)), log2e(static_cast<acc_t>(kLog2e));
    for (int64_t a = 0; a < p_.A; a += V::size()) {
      const int64_t lanes = std::min<int64_t>(V::size(), p_.A - a);
      V top(kLowest), sum(acc_t(0));
      for (int64_t j = 0; j < count; ++j) {
        acc_t* score = x.weights + j * p_.A + a;
        const V scaled = V::loadu(score, lanes) * scale;
        scaled.store(score, lanes);
        top = at::vec::maximum(top, scaled);
      }
      for (int64_t j = 0; j < count; ++j) {
        acc_t* score = x.weights + j * p_.A + a;
        const V power = exp2<kPrecisionOf<scalar_t>>((V::loadu(score, lanes) - top) * log2e);
        power.store(score, lanes);
        sum = sum + power;
      }
      acc_t tops[V::size()], sums[V::size()];
      top.store(tops);
      sum.store(sums);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        lse[(a + lane) * p_.Q] = count == 0 ? kLowest : tops[lane] + std::log(sums[lane]);
        x.share[a + lane] = count == 0 ? acc_t(0) : 1 / sums[lane];
      }
    }
  }

  const LocalAttention& p_;
  Heads<scalar_t> heads_;
};

}  // namespace

void local_cross_attention_forward(const LocalAttention& p) {
  with_scalar(p.dtype, [&](auto scalar) { Forward<decltype(scalar)>(p).run(); });
}

}  // namespace pyvlm::CPU_CAPABILITY
