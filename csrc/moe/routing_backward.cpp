// The gradient of the logits. With W the weights of the slots as a dense matrix, G their gradients, and D_t
// the sum of W_te G_te over e, it is W ∘ G - P D where the weights are probabilities P, and W ∘ G - W D where
// they are normalised, which is a softmax over the experts that a token keeps. A row of normalised weights
// that adds up to less than 1 was divided by the epsilon in place of its sum: to it the first form applies.
#include <algorithm>

#include "common/parallel.h"
#include "moe/routing_rows.h"

namespace pyvlm::CPU_CAPABILITY {
namespace {

template <typename scalar_t>
class Backward {
 public:
  using acc_t = typename RowSoftmax<scalar_t>::acc_t;

  explicit Backward(const RoutingBackward& args)
      : a_(args),
        experts_(args.logits.experts),
        size_(padded(experts_)),
        rows_(std::clamp<int64_t>(32768 / size_, 16, 512)) {}  // a chunk of W and G lies in L2

  void run() const {
    const int64_t chunks = (a_.logits.tokens + rows_ - 1) / rows_;
    Arena size;
    Scratch(size, size_, rows_);
    RowSoftmax<scalar_t>(a_.logits, size);
    run_tasks(chunks, rows_ * 16 * (experts_ + 32), [&](TaskQueue& queue) {
      const ThreadScratch memory(size.used());
      Arena arena = memory.arena();
      const Scratch scratch(arena, size_, rows_);
      const RowSoftmax<scalar_t> softmax(a_.logits, arena);
      for (int64_t c = queue.next(); c >= 0; c = queue.next()) {
        const int64_t begin = c * rows_, end = std::min(begin + rows_, a_.logits.tokens);
        spread(scratch, begin, end);
        for (int64_t t = begin; t < end; ++t) {
          row(scratch, softmax, t, t - begin);
        }
      }
    });
  }

 private:
  using V = Vec<acc_t>;

  struct Scratch {
    acc_t *weight, *grad;  // [rows, size]
    acc_t *p, *out;        // [size]

    Scratch(Arena& arena, int64_t size, int64_t rows) {
      weight = arena.take<acc_t>(rows * size);
      grad = arena.take<acc_t>(rows * size);
      p = arena.take<acc_t>(size);
      out = arena.take<acc_t>(size);
    }
  };

  // The slots of some tokens as dense rows.
  void spread(const Scratch& x, int64_t begin, int64_t end) const {
    const acc_t* weight = static_cast<const acc_t*>(a_.weight);
    const acc_t* grad = static_cast<const acc_t*>(a_.grad_weight);
    std::fill_n(x.weight, (end - begin) * size_, acc_t(0));
    std::fill_n(x.grad, (end - begin) * size_, acc_t(0));
    for (int64_t e = 0; e < experts_; ++e) {
      const int32_t* last = a_.token + a_.expert_offsets[e + 1];
      const int32_t* slot = std::lower_bound(a_.token + a_.expert_offsets[e], last, begin);
      for (; slot < last && *slot < end; ++slot) {
        const int64_t at = (*slot - begin) * size_ + e;
        x.weight[at] = weight[slot - a_.token];
        x.grad[at] = grad[slot - a_.token];
      }
    }
  }

  void row(const Scratch& x, const RowSoftmax<scalar_t>& softmax, int64_t t, int64_t place) const {
    constexpr acc_t kNormalised = 0.999;  // that a sum of 1 reaches, whatever rounding does
    const acc_t *weight = x.weight + place * size_, *grad = x.grad + place * size_;
    V weights(acc_t(0)), products(acc_t(0));
    for (int64_t e = 0; e < experts_; e += V::size()) {
      const V w = V::loadu(weight + e);
      weights = weights + w;
      products = at::vec::fmadd(w, V::loadu(grad + e), products);
    }
    const auto plus = [](const V& a, const V& b) { return a + b; };
    const acc_t total = at::vec::vec_reduce_all<acc_t>(plus, weights);
    const V product(at::vec::vec_reduce_all<acc_t>(plus, products));
    const acc_t* p = weight;
    if (total != 0 && !(a_.normalize && total > kNormalised)) {
      softmax(t, x.p);
      p = x.p;
    }
    for (int64_t e = 0; e < experts_; e += V::size()) {
      (V::loadu(weight + e) * V::loadu(grad + e) - V::loadu(p + e) * product).store(x.out + e);
    }
    at::vec::convert(x.out, static_cast<scalar_t*>(a_.grad_logits) + t * experts_, experts_);
  }

  const RoutingBackward& a_;
  int64_t experts_, size_, rows_;
};

}  // namespace

void routing_backward(const RoutingBackward& args) {
  with_dtype_of(args.logits, [&](auto t) { Backward<decltype(t)>(args).run(); });
}

}  // namespace pyvlm::CPU_CAPABILITY
