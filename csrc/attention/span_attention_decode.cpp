// The forward for few queries, as in decoding: bound by reading keys and values, which are read once, as they
// lie, for all query heads that share them. A task is a (batch, key/value head) and a chunk of its keys; a
// query's chunks are put together in order, so that the result is the same at any number of threads.
#include "attention/span_blocks.h"
#include "common/arena.h"
#include "common/empty.h"
#include "common/parallel.h"

namespace pyvlm::CPU_CAPABILITY {
namespace {

template <typename scalar_t>
class Decode {
 public:
  explicit Decode(const SpanForward& args)
      : a_(args),
        p_(args.problem),
        scores_(p_),
        rows_(p_.H / p_.G * p_.I),
        chunks_(std::max<int64_t>(1, (p_.J + kChunk - 1) / kChunk)),
        part_size_(p_.D + 2) {}

  void run() {
    const at::Tensor parts = make_plain({p_.B * p_.G * chunks_ * rows_ * p_.streams() * part_size_},
                                        c10::CppTypeToScalarType<acc_t>::value);
    parts_ = parts.mutable_data_ptr<acc_t>();
    Arena size;
    Scratch(size, *this);
    // Reading takes longer than multiplying: a task of one row is worth as much as one of eight.
    run_tasks(p_.B * p_.G * chunks_, std::max<int64_t>(rows_, 8) * 2 * kChunk * p_.D, [&](TaskQueue& queue) {
      const ThreadScratch memory(size.used());
      Arena arena = memory.arena();
      const Scratch scratch(arena, *this);
      std::fill(scratch.products, scratch.products + kBlock * V::size(), acc_t(0));
      for (int64_t task = queue.next(); task >= 0; task = queue.next()) {
        chunk(scratch, task / chunks_ / p_.G, task / chunks_ % p_.G, task % chunks_);
      }
    });
    run_tasks(p_.B * p_.H * p_.I, chunks_ * part_size_, [&](TaskQueue& queue) {
      std::vector<acc_t> sum(p_.streams() * p_.D);
      for (int64_t task = queue.next(); task >= 0; task = queue.next()) {
        finish(sum.data(), task / p_.I / p_.H, task / p_.I % p_.H, task % p_.I);
      }
    });
  }

 private:
  using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
  using V = Vec<acc_t>;
  using Power = Scores<acc_t, Precision::full>;
  static constexpr acc_t kLowest = -std::numeric_limits<acc_t>::infinity();
  static constexpr int64_t kChunk = 512;  // keys of a task

  struct Scratch {
    acc_t* q;         // [rows, D]
    acc_t* widened;   // [kBlock, D]: keys or values in acc_t
    acc_t* weights;   // [streams, rows, kBlock]
    acc_t* scores;    // [kBlock]
    acc_t* products;  // [kBlock, V::size()]

    Scratch(Arena& arena, const Decode& d) {
      q = arena.take<acc_t>(d.rows_ * d.p_.D);
      widened = arena.take<acc_t>(kBlock * d.p_.D);
      weights = arena.take<acc_t>(d.p_.streams() * d.rows_ * kBlock);
      scores = arena.take<acc_t>(kBlock);
      products = arena.take<acc_t>(kBlock * V::size());
    }
  };

  // Of a chunk, for one row and stream: the largest score, the sum of powers, and the values' weighted sum.
  acc_t* part(int64_t b, int64_t g, int64_t chunk, int64_t row, int s) const {
    return parts_ + ((((b * p_.G + g) * chunks_ + chunk) * rows_ + row) * p_.streams() + s) * part_size_;
  }

  const int32_t* bounds(int64_t b, int64_t row) const {
    return p_.bounds + (b * p_.I + row % p_.I) * p_.ranges * 2;
  }

  void chunk(const Scratch& x, int64_t b, int64_t g, int64_t chunk) const {
    const int streams = p_.streams();
    const int64_t begin = chunk * kChunk, end = std::min(begin + kChunk, p_.J);
    int64_t first = end, last = begin;  // of the keys in any row's ranges
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t h = g * (p_.H / p_.G) + row / p_.I;
      const scalar_t* q = a_.q.template at<scalar_t>(b, h, row % p_.I);
      for (int64_t d = 0; d < p_.D; ++d) {
        x.q[row * p_.D + d] = static_cast<acc_t>(q[d]);
      }
      for (int s = 0; s < streams; ++s) {
        acc_t* of_row = part(b, g, chunk, row, s);
        of_row[0] = kLowest;
        std::fill(of_row + 1, of_row + part_size_, acc_t(0));
      }
      for (int r = 0; r < p_.ranges; ++r) {
        const int32_t* range = bounds(b, row) + 2 * r;
        if (range[0] < range[1]) {
          first = std::min<int64_t>(first, range[0]);
          last = std::max<int64_t>(last, range[1]);
        }
      }
    }
    first = std::max(first, begin);
    last = std::min(last, end);
    for (int64_t j = first; j < last; j += kBlock) {
      block(x, b, g, chunk, j, last);
    }
  }

  void block(const Scratch& x, int64_t b, int64_t g, int64_t chunk, int64_t first, int64_t end) const {
    const int64_t count = std::min(kBlock, end - first);
    const scalar_t* k = a_.k.template at<scalar_t>(b, g, first);
    const scalar_t* v = a_.v.template at<scalar_t>(b, g, first);
    prefetch(k + kBlock * a_.k.token, a_.k.token, end - first - kBlock);
    prefetch(v + kBlock * a_.v.token, a_.v.token, end - first - kBlock);
    // What several rows need in acc_t is converted once.
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      attend(x, b, g, chunk, first, count, k, a_.k.token, [&](int64_t& ld) { return ld = a_.v.token, v; });
    } else if (rows_ == 1 && p_.D % (2 * V::size()) == 0) {
      attend(x, b, g, chunk, first, count, k, a_.k.token, [&](int64_t& ld) { return ld = a_.v.token, v; });
    } else {
      const auto widened = [&](const scalar_t* from, int64_t ld) {
        for (int64_t j = 0; j < count; ++j) {
          at::vec::convert(from + j * ld, x.widened + j * p_.D, p_.D);
        }
        return static_cast<const acc_t*>(x.widened);
      };
      const acc_t* keys = widened(k, a_.k.token);
      attend(x, b, g, chunk, first, count, keys, p_.D,
             [&](int64_t& ld) { return ld = p_.D, widened(v, a_.v.token); });
    }
  }

  // Into L2, while a block is worked on: the hardware starts anew at every page, of which 32 keys are two.
  void prefetch(const scalar_t* from, int64_t ld, int64_t keys) const {
    constexpr int64_t line = 64 / sizeof(scalar_t);
    for (int64_t j = 0; j < std::min(kBlock, keys); ++j) {
      for (int64_t d = 0; d < p_.D; d += line) {
        __builtin_prefetch(from + j * ld + d, 0, 2);
      }
    }
  }

  template <typename T, typename Values>
  void attend(const Scratch& x, int64_t b, int64_t g, int64_t chunk, int64_t first, int64_t count, const T* k,
              int64_t k_ld, const Values& values) const {
    const int streams = p_.streams();
    bool any = false;
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t j = 0; j < count; ++j) {
        dot(x.q + row * p_.D, k + j * k_ld).store(x.products + j * V::size());
      }
      for (int64_t j = 0; j < kBlock; j += 16) {
        sum_lanes(x.scores + j, x.products + j * V::size());
      }
      scores_.prepare(x.scores, kBlock);
      for (int s = 0; s < streams; ++s) {
        any |= weigh(x, b, row, s, first, count, part(b, g, chunk, row, s));
      }
    }
    if (!any) {
      return;
    }
    int64_t v_ld = 0;
    const T* v = values(v_ld);
    for (int64_t row = 0; row < rows_; ++row) {
      for (int s = 0; s < streams; ++s) {
        add_values(part(b, g, chunk, row, s) + 2, x.weights + (row * streams + s) * kBlock, v, v_ld, count);
      }
    }
  }

  // q · k, not yet summed over the lanes.
  template <typename T>
  V dot(const acc_t* q, const T* k) const {
    constexpr int64_t size = V::size();
    V sum[2] = {V(acc_t(0)), V(acc_t(0))}, k0, k1;
    int64_t d = 0;
    for (; d + 2 * size <= p_.D; d += 2 * size) {
      load_two(k + d, k0, k1);
      sum[0] = at::vec::fmadd(V::loadu(q + d), k0, sum[0]);
      sum[1] = at::vec::fmadd(V::loadu(q + d + size), k1, sum[1]);
    }
    if constexpr (std::is_same_v<T, acc_t>) {
      for (; d < p_.D; d += size) {
        const int64_t left = std::min(size, p_.D - d);
        sum[0] = at::vec::fmadd(V::loadu(q + d, left), V::loadu(k + d, left), sum[0]);
      }
    }
    return sum[0] + sum[1];
  }

  // The weights of a block's values in one softmax; the sums so far are scaled to a larger maximum. False
  // where the row sees none of the keys.
  bool weigh(const Scratch& x, int64_t b, int64_t row, int s, int64_t first, int64_t count,
             acc_t* of_row) const {
    acc_t* weights = x.weights + (row * p_.streams() + s) * kBlock;
    acc_t top = kLowest;
    std::fill(weights, weights + kBlock, kLowest);
    const int first_range = p_.separate ? s : 0, last_range = p_.separate ? s + 1 : p_.ranges;
    const uint8_t* key_class = p_.key_class + b * p_.J + first;
    for (int r = first_range; r < last_range; ++r) {
      const int32_t* range = bounds(b, row) + 2 * r;
      const int64_t end = std::min<int64_t>(count, range[1] - first);
      for (int64_t j = std::max<int64_t>(0, range[0] - first); j < end; ++j) {
        const bool sees = (p_.range_classes[r] >> key_class[j] & 1) != 0;
        weights[j] = sees ? x.scores[j] : weights[j];
        top = std::max(top, weights[j]);
      }
    }
    if (top == kLowest) {
      std::fill(weights, weights + kBlock, acc_t(0));
      return false;
    }
    top *= scores_.factor;
    if (top > of_row[0]) {
      const acc_t shrink = std::exp(of_row[0] - top);
      of_row[0] = top;
      for (int64_t d = 1; d < part_size_; ++d) {
        of_row[d] *= shrink;
      }
    }
    const V factor(scores_.factor), base(of_row[0]);
    V sum(acc_t(0));
    for (int64_t j = 0; j < kBlock; j += V::size()) {
      const V power = Power::power(V::loadu(weights + j), factor, base);
      power.store(weights + j);
      sum = sum + power;
    }
    of_row[1] += at::vec::vec_reduce_all<acc_t>([](V x, V y) { return x + y; }, sum);
    return true;
  }

  template <typename T>
  void add_values(acc_t* out, const acc_t* weights, const T* v, int64_t ld, int64_t count) const {
    constexpr int64_t size = V::size();
    V v0, v1;
    int64_t d = 0;
    for (; d + 2 * size <= p_.D; d += 2 * size) {
      V sum[2] = {V::loadu(out + d), V::loadu(out + d + size)};
      for (int64_t j = 0; j < count; ++j) {
        const V weight(weights[j]);
        load_two(v + j * ld + d, v0, v1);
        sum[0] = at::vec::fmadd(weight, v0, sum[0]);
        sum[1] = at::vec::fmadd(weight, v1, sum[1]);
      }
      store_row(out + d, sum[0], sum[1]);
    }
    if constexpr (std::is_same_v<T, acc_t>) {
      for (; d < p_.D; d += size) {
        const int64_t left = std::min(size, p_.D - d);
        V sum = V::loadu(out + d, left);
        for (int64_t j = 0; j < count; ++j) {
          sum = at::vec::fmadd(V(weights[j]), V::loadu(v + j * ld + d, left), sum);
        }
        sum.store(out + d, left);
      }
    }
  }

  void finish(acc_t* sums, int64_t b, int64_t h, int64_t i) const {
    const int64_t g = h / (p_.H / p_.G), row = h % (p_.H / p_.G) * p_.I + i;
    const int streams = p_.streams();
    for (int s = 0; s < streams; ++s) {
      acc_t top = kLowest, total = 0;
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
        top = std::max(top, part(b, g, chunk, row, s)[0]);
      }
      acc_t* sum = sums + s * p_.D;
      std::fill(sum, sum + p_.D, acc_t(0));
      for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
        const acc_t* of_chunk = part(b, g, chunk, row, s);
        if (of_chunk[0] == kLowest) {
          continue;
        }
        const acc_t shrink = std::exp(of_chunk[0] - top);
        total += of_chunk[1] * shrink;
        for (int64_t d = 0; d < p_.D; ++d) {
          sum[d] += of_chunk[2 + d] * shrink;
        }
      }
      const auto softmax = end_softmax(p_, h, top, total);
      static_cast<acc_t*>(a_.lse)[((b * p_.H + h) * streams + s) * p_.I + i] = softmax.lse;
      for (int64_t d = 0; d < p_.D; ++d) {
        sum[d] *= softmax.share;
      }
    }
    scalar_t* out = a_.out.template at<scalar_t>(b, h, i);
    for (int64_t d = 0; d < p_.D; ++d) {
      if (streams == 2) {
        a_.stream_out.template at<scalar_t>(b, h, i)[d * a_.stream_out.dim] = static_cast<scalar_t>(sums[d]);
        sums[d] += sums[p_.D + d];
      }
      out[d * a_.out.dim] = static_cast<scalar_t>(sums[d]);
    }
  }

  const SpanForward& a_;
  const SpanProblem& p_;
  Power scores_;
  int64_t rows_, chunks_, part_size_;
  acc_t* parts_ = nullptr;
};

}  // namespace

void span_attention_decode(const SpanForward& args) {
  with_scalar(args.problem.dtype, [&](auto scalar) { Decode<decltype(scalar)>(args).run(); });
}

}  // namespace pyvlm::CPU_CAPABILITY
