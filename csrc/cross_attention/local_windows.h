// What the forward and the backward of attention to windows share: which keys a query sees, and products of
// all heads of a query with rows of keys or values.
//
// Reading keys and values is what takes the time. So a token is read once, with all heads, which usually lie
// side by side, and what comes next is asked for ahead.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "common/arena.h"
#include "common/pack.h"
#include "common/parallel.h"
#include "cross_attention/local_cross_attention.h"

namespace pyvlm::CPU_CAPABILITY {

inline constexpr int64_t kTaskQueries = 8;  // consecutive queries of an image
inline constexpr int64_t kProducts = 16;    // vectors that sum_lanes takes at once

// One token of a [N, A, T, D] tensor: its heads, `head` elements apart.
template <typename scalar_t>
struct Token {
  scalar_t* data = nullptr;
  int64_t head = 0;
};

template <typename scalar_t>
Token<scalar_t> token_of(const HeadRows& rows, int64_t n, int64_t t) {
  return {rows.at<scalar_t>(n, t), rows.head};
}

struct Key {
  int64_t map, token;
};

// Calls f(key, visible) for the window of a query, map by map and row by row.
template <typename Function>
void each_key(const LocalAttention& p, int64_t n, int64_t query, const Function& f) {
  const int64_t row = query / p.columns, column = query % p.columns;
  for (size_t m = 0; m < p.maps.size(); ++m) {
    const LocalMap& map = p.maps[m];
    for (int64_t y = row * map.side; y < (row + 1) * map.side; ++y) {
      const int64_t first = (y * p.columns + column) * map.side;
      for (int64_t t = first; t < first + map.side; ++t) {
        f(Key{static_cast<int64_t>(m), t}, map.mask == nullptr || map.mask[n * map.T + t]);
      }
    }
  }
}

// Calls f(n, first query, queries) for each task, on several threads, with a scratch that is made of an
// Arena.
template <typename Scratch, typename Function>
void each_query_block(const LocalAttention& p, int64_t products, const Function& f) {
  const int64_t blocks = (p.Q + kTaskQueries - 1) / kTaskQueries;
  Arena size;
  Scratch(size, p);
  run_tasks(p.N * blocks, kTaskQueries * products * p.window * p.A * p.D, [&](TaskQueue& queue) {
    const ThreadScratch memory(size.used());
    Arena arena = memory.arena();
    const Scratch scratch(arena, p);
    for (int64_t task = queue.next(); task >= 0; task = queue.next()) {
      const int64_t first = task % blocks * kTaskQueries;
      f(scratch, task / blocks, first, std::min(kTaskQueries, p.Q - first));
    }
  });
}

// Two vectors from `count` elements, zeros behind them.
template <typename acc_t, typename T>
void load_two(const T* from, int64_t count, Vec<acc_t>& x0, Vec<acc_t>& x1) {
  constexpr int64_t size = Vec<acc_t>::size();
  if (count >= 2 * size) {
    load_two(from, x0, x1);
  } else if constexpr (std::is_same_v<T, acc_t>) {
    x0 = Vec<acc_t>::loadu(from, std::min(count, size));
    x1 = Vec<acc_t>::loadu(from + size, std::max<int64_t>(count - size, 0));
  } else {
    std::tie(x0, x1) = at::vec::convert_to_float<T>(Vec<T>::loadu(from, count));
  }
}

template <typename acc_t, typename T>
void store_two(T* to, int64_t count, const Vec<acc_t>& x0, const Vec<acc_t>& x1) {
  constexpr int64_t size = Vec<acc_t>::size();
  if constexpr (std::is_same_v<T, acc_t>) {
    x0.store(to, std::min(count, size));
    if (count > size) {
      x1.store(to + size, std::min(count - size, size));
    }
  } else {
    at::vec::convert_from_float<T>(x0, x1).store(to, std::min(count, 2 * size));
  }
}

// The same past the caches, where the place is aligned and whole: nobody reads it soon.
template <typename acc_t, typename T>
void stream_two([[maybe_unused]] T* to, const Vec<acc_t>& x0, const Vec<acc_t>& x1) {
  const auto put = [](T* at, const Vec<T>& x) {
#if defined(CPU_CAPABILITY_AVX512)
    __m512i bits;
    std::memcpy(&bits, &x, sizeof(bits));
    _mm512_stream_si512(reinterpret_cast<__m512i*>(at), bits);
#elif defined(CPU_CAPABILITY_AVX2)
    __m256i bits;
    std::memcpy(&bits, &x, sizeof(bits));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(at), bits);
#else
    x.store(at);
#endif
  };
  if constexpr (std::is_same_v<T, acc_t>) {
    put(to, x0);
    put(to + Vec<acc_t>::size(), x1);
  } else {
    put(to, at::vec::convert_from_float<T>(x0, x1));
  }
}

// Behind the last of them, before other threads may read.
inline void end_streams() {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  _mm_sfence();
#endif
}

// The arithmetic of one query with one token, for all heads. Rows in acc_t are [A, width], zeros behind D.
template <typename scalar_t>
class Heads {
 public:
  using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
  using V = Vec<acc_t>;
  static constexpr int64_t kStep = 2 * V::size();

  explicit Heads(const LocalAttention& p) : A_(p.A), D_(p.D), width_(round_up(p.D, kStep)) {}

  int64_t width() const { return width_; }

  void load(acc_t* to, const Token<scalar_t>& from) const {
    for (int64_t a = 0; a < A_; ++a) {
      each_step([&](int64_t d, int64_t left) {
        V x0, x1;
        load_two<acc_t>(from.data + a * from.head + d, left, x0, x1);
        x0.store(to + a * width_ + d);
        x1.store(to + a * width_ + d + V::size());
      });
    }
  }

  // to[a] = from[a] · factor[a]; where `stream`, past the caches: `to` is then aligned, and D a multiple of
  // kStep.
  template <bool stream = false>
  void store(const Token<scalar_t>& to, const acc_t* from, const acc_t* factor) const {
    for (int64_t a = 0; a < A_; ++a) {
      const V by(factor[a]);
      each_step([&](int64_t d, int64_t left) {
        const acc_t* x = from + a * width_ + d;
        const V x0 = V::loadu(x) * by, x1 = V::loadu(x + V::size()) * by;
        if constexpr (stream) {
          stream_two<acc_t>(to.data + a * to.head + d, x0, x1);
        } else {
          store_two<acc_t>(to.data + a * to.head + d, left, x0, x1);
        }
      });
    }
  }

  void zero(const Token<scalar_t>& to) const {
    for (int64_t a = 0; a < A_; ++a) {
      std::fill(to.data + a * to.head, to.data + a * to.head + D_, scalar_t(0));
    }
  }

  // sum[a] += factor[a] · token[a]
  void add(acc_t* sum, const acc_t* factor, const Token<scalar_t>& token,
           const Token<scalar_t>& ahead) const {
    for (int64_t a = 0; a < A_; ++a) {
      prefetch(ahead, a);
      const V by(factor[a]);
      const scalar_t* row = token.data + a * token.head;
      each_step([&](int64_t d, int64_t left) {
        acc_t* s = sum + a * width_ + d;
        V x0, x1;
        load_two<acc_t>(row + d, left, x0, x1);
        at::vec::fmadd(by, x0, V::loadu(s)).store(s);
        at::vec::fmadd(by, x1, V::loadu(s + V::size())).store(s + V::size());
      });
    }
  }

  // out[j, a] = rows[a] · token(j)[a] for `count` tokens. `out` has room for count · A rounded up to
  // kProducts, and ahead(j) is what is asked for beside token j. `products` holds kProducts vectors.
  template <typename Tokens, typename Ahead>
  void dots(acc_t* out, acc_t* products, const acc_t* rows, int64_t count, const Tokens& token,
            const Ahead& ahead) const {
    int64_t i = 0;
    for (int64_t j = 0; j < count; ++j) {
      const Token<scalar_t> of_j = token(j), next = ahead(j);
      for (int64_t a = 0; a < A_; ++a, ++i) {
        prefetch(next, a);
        dot(rows + a * width_, of_j.data + a * of_j.head).store(products + i % kProducts * V::size());
        if (i % kProducts == kProducts - 1) {
          sum_lanes(out + i + 1 - kProducts, products);
        }
      }
    }
    if (i % kProducts != 0) {
      sum_lanes(out + i / kProducts * kProducts, products);
    }
  }

 private:
  template <typename Step>
  void each_step(const Step& step) const {
    for (int64_t d = 0; d < D_; d += kStep) {
      step(d, D_ - d);
    }
  }

  // Into L2: the hardware starts anew at every page.
  void prefetch(const Token<scalar_t>& token, int64_t a) const {
    constexpr int64_t kLine = 64 / sizeof(scalar_t);
    if (token.data != nullptr) {
      for (int64_t d = 0; d < D_; d += kLine) {
        __builtin_prefetch(token.data + a * token.head + d, 0, 2);
      }
    }
  }

  V dot(const acc_t* x, const scalar_t* y) const {
    V sum[2] = {V(acc_t(0)), V(acc_t(0))};
    each_step([&](int64_t d, int64_t left) {
      V y0, y1;
      load_two<acc_t>(y + d, left, y0, y1);
      sum[0] = at::vec::fmadd(V::loadu(x + d), y0, sum[0]);
      sum[1] = at::vec::fmadd(V::loadu(x + d + V::size()), y1, sum[1]);
    });
    return sum[0] + sum[1];
  }

  int64_t A_, D_, width_;
};

}  // namespace pyvlm::CPU_CAPABILITY
