// The forward of experts for few tokens: reading the weights is what takes time, so each row of them is read
// once, as it lies, and multiplied with the tokens of its expert while it is in registers.
#include "moe/expert_slots.h"

namespace pyvlm::CPU_CAPABILITY {
namespace {

template <typename scalar_t>
class Decode {
 public:
  explicit Decode(const ExpertForward& args) : a_(args), p_(args.problem) {
    for (int64_t e = 0; e < p_.E; ++e) {
      if (p_.expert_offsets[e] < p_.expert_offsets[e + 1]) {
        experts_.push_back(e);
      }
    }
  }

  void run() {
    const CallScratch memory((2 * p_.H + p_.I) * p_.S * sizeof(acc_t) + 3 * 64);
    Arena arena = memory.arena();
    x_ = arena.take<acc_t>(p_.S * p_.H);
    act_ = arena.take<acc_t>(p_.S * p_.I);
    rows_ = arena.take<acc_t>(p_.S * p_.H);
    for (int64_t s = 0; s < p_.S; ++s) {
      at::vec::convert(at(p_.x, p_.token[s] * p_.H), x_ + s * p_.H, p_.H);
    }
    for_rows(p_.I, (p_.gated ? 2 : 1) * p_.H,
             [&](int64_t e, int64_t first, int64_t count) { up(e, first, count); });
    for_rows(p_.H, p_.I, [&](int64_t e, int64_t first, int64_t count) { down(e, first, count); });
    sum_slots<acc_t>(p_, rows_, static_cast<scalar_t*>(a_.y));
  }

 private:
  using acc_t = typename std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
  using V = Vec<acc_t>;
  static constexpr Precision kPrecision = kPrecisionOf<scalar_t>;
  static constexpr int64_t kRows = 32;  // rows of a task

  static const scalar_t* at(const void* tensor, int64_t offset) {
    return static_cast<const scalar_t*>(tensor) + offset;
  }

  template <typename Work>
  void for_rows(int64_t rows, int64_t depth, const Work& work) const {
    const int64_t blocks = (rows + kRows - 1) / kRows;
    run_tasks(experts_.size() * blocks, kRows * depth, [&](TaskQueue& queue) {
      for (int64_t task = queue.next(); task >= 0; task = queue.next()) {
        const int64_t first = task % blocks * kRows;
        work(experts_[task / blocks], first, std::min(kRows, rows - first));
      }
    });
  }

  void up(int64_t e, int64_t first, int64_t count) const {
    const int64_t slot = p_.expert_offsets[e], tokens = p_.expert_offsets[e + 1] - slot;
    acc_t z[2][kMaxDecodeTokens * kRows];  // [token, row], gate rows and up rows
    for (int half = 0; half < (p_.gated ? 2 : 1); ++half) {
      const int64_t row = e * p_.U + half * p_.I + first;
      multiply(at(p_.gate_up, row * p_.H), p_.H, count, x_ + slot * p_.H, tokens, z[half]);
      for (int64_t t = 0; t < tokens; ++t) {
        acc_t* of_token = z[half] + t * kRows;
        for (int64_t j = 0; j < count && p_.up_bias != nullptr; ++j) {
          of_token[j] += static_cast<acc_t>(*at(p_.up_bias, row + j));
        }
        if (a_.hidden != nullptr) {
          at::vec::convert(
              of_token, static_cast<scalar_t*>(a_.hidden) + (slot + t) * p_.U + half * p_.I + first, count);
        }
      }
    }
    with_activation(p_.activation, [&](auto activation) {
      constexpr Activation kActivation = activation.value;
      for (int64_t t = 0; t < tokens; ++t) {
        acc_t *gate = z[0] + t * kRows, *out = act_ + (slot + t) * p_.I + first;
        at::vec::map<acc_t>([](V v) { return activate<kActivation, kPrecision>(v); }, out, gate, count);
        if (p_.gated) {
          at::vec::map2<acc_t>([](V a, V b) { return a * b; }, out, out, z[1] + t * kRows, count);
        }
      }
    });
  }

  void down(int64_t e, int64_t first, int64_t count) const {
    const int64_t slot = p_.expert_offsets[e], tokens = p_.expert_offsets[e + 1] - slot;
    acc_t out[kMaxDecodeTokens * kRows];
    multiply(at(p_.down, (e * p_.H + first) * p_.I), p_.I, count, act_ + slot * p_.I, tokens, out);
    for (int64_t t = 0; t < tokens; ++t) {
      const acc_t weight = static_cast<const acc_t*>(p_.weight)[slot + t];
      acc_t* row = rows_ + (slot + t) * p_.H + first;
      for (int64_t j = 0; j < count; ++j) {
        const acc_t bias =
            p_.down_bias == nullptr ? acc_t(0) : static_cast<acc_t>(*at(p_.down_bias, e * p_.H + first + j));
        row[j] = (out[t * kRows + j] + bias) * weight;
      }
    }
  }

  // out[t, j] = rows[j] · tokens[t], both K long, for `number` tokens.
  template <int N = 1>
  static void multiply(const scalar_t* rows, int64_t K, int64_t count, const acc_t* tokens, int64_t number,
                       acc_t* out) {
    if constexpr (N < kMaxDecodeTokens) {
      if (number > N) {
        return multiply<N + 1>(rows, K, count, tokens, number, out);
      }
    }
    multiply_by<N>(rows, K, count, tokens, out);
  }

  template <int N>
  static void multiply_by(const scalar_t* rows, int64_t K, int64_t count, const acc_t* tokens, acc_t* out) {
    constexpr int R = N <= 4 ? 4 : 2;  // sums in at most 16 registers
    int64_t j = 0;
    for (; j + R <= count; j += R) {
      dots<R, N>(rows + j * K, K, tokens, out + j);
    }
    for (; j < count; ++j) {
      dots<1, N>(rows + j * K, K, tokens, out + j);
    }
  }

  template <int R, int N>
  static void dots(const scalar_t* rows, int64_t K, const acc_t* tokens, acc_t* out) {
    constexpr int64_t kStep = 2 * V::size();
    V sums[R][N];
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < N; ++t) {
        sums[r][t] = V(acc_t(0));
      }
    }
    int64_t k = 0;
    for (; k + kStep <= K; k += kStep) {
      V x0[N], x1[N];
      for (int t = 0; t < N; ++t) {
        x0[t] = V::loadu(tokens + t * K + k);
        x1[t] = V::loadu(tokens + t * K + k + V::size());
      }
      for (int r = 0; r < R; ++r) {
        // The next rows, into L2: the hardware starts anew at every page.
        __builtin_prefetch(rows + (r + R) * K + k, 0, 2);
        V w0, w1;
        load_two(rows + r * K + k, w0, w1);
        for (int t = 0; t < N; ++t) {
          sums[r][t] = at::vec::fmadd(w0, x0[t], at::vec::fmadd(w1, x1[t], sums[r][t]));
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int t = 0; t < N; ++t) {
        acc_t sum = at::vec::vec_reduce_all<acc_t>([](V a, V b) { return a + b; }, sums[r][t]);
        for (int64_t rest = k; rest < K; ++rest) {
          sum += static_cast<acc_t>(rows[r * K + rest]) * tokens[t * K + rest];
        }
        out[t * kRows + r] = sum;
      }
    }
  }

  const ExpertForward& a_;
  const ExpertProblem& p_;
  acc_t *x_, *act_, *rows_;       // [S, H], [S, I], [S, H]
  std::vector<int64_t> experts_;  // that have tokens
};

}  // namespace

void expert_mlp_decode(const ExpertForward& args) {
  with_scalar(args.problem.dtype, [&](auto scalar) { Decode<decltype(scalar)>(args).run(); });
}

}  // namespace pyvlm::CPU_CAPABILITY
