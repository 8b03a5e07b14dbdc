// The choice of every router, in two steps. Rows are read once, in chunks: each row's softmax, and a
// candidate for every expert that may want the token. Then each expert takes its best candidates. Candidates
// lie in the order of their rows, whatever the chunks are, so the result is the same at any number of
// threads.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <memory>
#include <vector>

#include "common/empty.h"
#include "common/parallel.h"
#include "moe/routing_rows.h"
#include "moe/routing_select.h"

namespace pyvlm::CPU_CAPABILITY {
namespace {

template <typename scalar_t>
class Router {
 public:
  using acc_t = typename RowSoftmax<scalar_t>::acc_t;

  explicit Router(const Logits& logits) : logits_(logits), experts_(logits.experts) {}

  void expert_choice(const ExpertChoice& args, SlotList& out) const {
    std::vector<int64_t> first(args.groups + 1, 0);  // of each group's slots among those of an expert
    for (int64_t g = 0; g < args.groups; ++g) {
      first[g + 1] = first[g] + std::min(args.capacity[g], args.offsets[g + 1] - args.offsets[g]);
    }
    std::vector<int64_t> offsets(experts_ + 1);
    for (int64_t e = 0; e <= experts_; ++e) {
      offsets[e] = e * first[args.groups];
    }
    allocate(offsets, out);
    std::atomic<bool> good = true;
    const auto choose = [&](int64_t g) {
      const auto place = [&](int64_t e) { return offsets[e] + first[g]; };
      if (!choose_in_group(args.offsets[g], args.offsets[g + 1], args.capacity[g], place, out)) {
        good = false;
      }
    };
    // Large groups keep all threads busy one after another, small ones side by side.
    std::vector<int64_t> small;
    for (int64_t g = 0; g < args.groups; ++g) {
      if (args.offsets[g + 1] - args.offsets[g] > chunk_rows()) {
        choose(g);
      } else {
        small.push_back(g);
      }
    }
    run_each(static_cast<int64_t>(small.size()), work_of_rows(chunk_rows()),
             [&](int64_t i) { choose(small[i]); });
    if (!good) {
      out = {};
    }
  }

  void threshold_choice(const ThresholdChoice& args, SlotList& out) const {
    std::vector<acc_t> bounds(padded(experts_), kInfinity);
    for (int64_t e = 0; e < experts_;
         ++e) {  // up, so that p reaches the bound where it reaches the threshold
      bounds[e] = static_cast<acc_t>(args.thresholds[e]);
      if (static_cast<double>(bounds[e]) < args.thresholds[e]) {
        bounds[e] = std::nextafter(bounds[e], kInfinity);
      }
    }
    const Candidates found = collect(logits_.tokens, false, in_order(0), reaching(bounds));
    take_all(found, logits_.tokens, out);
  }

  void token_choice(const TokenChoice& args, SlotList& out) const {
    // -inf marks what is taken already, so that no score may be as low.
    constexpr acc_t kLowest = std::numeric_limits<acc_t>::lowest();
    const int64_t size = padded(experts_);
    std::vector<acc_t> bias(size, 0);
    if (args.bias != nullptr) {
      std::transform(args.bias, args.bias + experts_, bias.begin(),
                     [](double b) { return static_cast<acc_t>(std::max(b, static_cast<double>(kLowest))); });
    }
    const auto best = [&](const acc_t* p, acc_t* scores, int32_t base, int32_t* places) {
      for (int64_t e = 0; e < experts_; ++e) {
        scores[e] = p[e] + bias[e];
      }
      std::fill(scores + experts_, scores + size, -kInfinity);
      for (int64_t k = 0; k < args.top_k; ++k) {
        const int64_t e = argmax(scores, size);
        *places++ = base + static_cast<int32_t>(e);
        scores[e] = -kInfinity;
      }
      return places;
    };
    const bool ranked = args.by_position && args.capacity < logits_.tokens;
    take_all(collect(logits_.tokens, ranked, in_order(0), best), args.capacity, out);
  }

 private:
  static constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity();

  // Softmaxes of several rows overlap in the pipeline, until a branch on their values is mispredicted: row by
  // row took a tenth longer.
  static constexpr int64_t kRowsAtOnce = 16;

  // Rows that are being read meanwhile: on logits that lie in no cache, 5.7 ms become 4.7.
  static constexpr int64_t kRowsAhead = 2 * kRowsAtOnce;

  // Of each expert, in the order of the rows.
  struct Candidates {
    struct Chunk {
      std::unique_ptr<int32_t[]> start, token;  // [E + 1], [candidates]
      std::unique_ptr<acc_t[]> p, rank;         // rank: null where p decides

      int64_t count(int64_t e) const { return start[e + 1] - start[e]; }
    };
    std::vector<Chunk> chunks;
    bool good = true;  // every row has a softmax

    int64_t count(int64_t e) const {
      int64_t total = 0;
      for (const Chunk& chunk : chunks) {
        total += chunk.count(e);
      }
      return total;
    }
  };

  // The ends of the lists in scratch memory must not all fall into one set of L1: 65,536 rows of 64 experts
  // took 6.0 ms on one core, and take 4.1 with this.
  static int64_t list_stride(int64_t rows) { return rows + 16; }

  // Rows of scratch memory are 2^row_bits apart.
  static int row_bits(int64_t experts) {
    return std::countr_zero(std::bit_ceil(static_cast<uint64_t>(padded(experts))));
  }

  // Room for a chunk's candidates before they are packed.
  struct Scratch {
    acc_t *p, *scores;       // [kRowsAtOnce, 2^row_bits], [padded E]
    int32_t* places;         // of a block's candidates in p
    acc_t *found, *rank;     // [E, list_stride]
    int32_t *token, *count;  // [E, list_stride], [E]

    Scratch(Arena& arena, int64_t experts, int64_t rows, bool ranked) {
      p = arena.take<acc_t>(kRowsAtOnce << row_bits(experts));
      places = arena.take<int32_t>((kRowsAtOnce << row_bits(experts)) + 16);
      scores = arena.take<acc_t>(padded(experts));
      count = arena.take<int32_t>(experts);
      found = arena.take<acc_t>(experts * list_stride(rows));
      token = arena.take<int32_t>(experts * list_stride(rows));
      rank = ranked ? arena.take<acc_t>(experts * list_stride(rows)) : nullptr;
    }
  };

  // All candidates of an expert.
  struct Gathered {
    int32_t* token;
    acc_t *p, *score;

    Gathered(Arena& arena, int64_t count, bool ranked) {
      token = arena.take<int32_t>(count);
      p = arena.take<acc_t>(count);
      score = ranked ? arena.take<acc_t>(count) : p;
    }
  };

  // Scratch memory of a chunk lies in L2, and its lists are long enough to be copied.
  int64_t chunk_rows() const { return std::clamp<int64_t>(65536 / experts_, 64, 1024); }

  // In multiply-adds: about 60 cycles a row of 64 experts.
  int64_t work_of_rows(int64_t rows) const { return rows * 16 * (experts_ + 32); }

  static auto in_order(int64_t first) {
    return [first](int64_t i) { return first + i; };
  }

  // The experts whose bound a row reaches.
  auto reaching(const std::vector<acc_t>& bounds) const {
    return [&bounds, this](const acc_t* p, acc_t*, int32_t base, int32_t* places) {
      return write_places(p, bounds.data(), padded(experts_), base, places);
    };
  }

  // The candidates among the rows row_of(0) to row_of(count - 1): choose(p, scratch row, base, places) writes
  // base + expert for each expert that a row is a candidate of, first choices first, and returns their end.
  template <typename RowOf, typename Choose>
  Candidates collect(int64_t count, bool ranked, const RowOf& row_of, const Choose& choose) const {
    const int64_t rows = std::clamp<int64_t>(count / at::get_num_threads(), 64, chunk_rows());
    const int64_t chunks = (count + rows - 1) / rows;
    Candidates found;
    found.chunks.resize(chunks);
    std::atomic<bool> good = true;
    Arena size;
    Scratch(size, experts_, rows, ranked);
    RowSoftmax<scalar_t>(logits_, size);
    run_each(chunks, work_of_rows(rows), [&](int64_t c) {
      const ThreadScratch memory(size.used());
      Arena arena = memory.arena();
      const Scratch scratch(arena, experts_, rows, ranked);
      const RowSoftmax<scalar_t> softmax(logits_, arena);
      const int bits = row_bits(experts_);
      std::fill_n(scratch.p, kRowsAtOnce << bits, acc_t(0));
      std::fill_n(scratch.count, experts_, 0);
      const int64_t end = std::min(count, (c + 1) * rows);
      for (int64_t first = c * rows; first < end; first += kRowsAtOnce) {
        const int64_t block = std::min(kRowsAtOnce, end - first);
        bool block_good = true;
        int32_t row[kRowsAtOnce], *begin[kRowsAtOnce + 1] = {scratch.places};
        for (int64_t i = 0; i < block; ++i) {
          if (first + i + kRowsAhead < end) {
            softmax.prefetch(row_of(first + i + kRowsAhead));
          }
          row[i] = static_cast<int32_t>(row_of(first + i));
          block_good &= softmax(row[i], scratch.p + (i << bits));
        }
        if (!block_good) {
          good = false;
          return;
        }
        for (int64_t i = 0; i < block; ++i) {
          const auto base = static_cast<int32_t>(i << bits);
          begin[i + 1] = choose(scratch.p + base, scratch.scores, base, begin[i]);
        }
        for (const int32_t* place = scratch.places; place < begin[block]; ++place) {
          const int64_t i = *place >> bits, e = *place & ((1 << bits) - 1);
          const int64_t at = e * list_stride(rows) + scratch.count[e]++;
          scratch.token[at] = row[i];
          scratch.found[at] = scratch.p[*place];
          if (ranked) {
            scratch.rank[at] = static_cast<acc_t>(experts_ - (place - begin[i]));
          }
        }
      }
      found.chunks[c] = packed(scratch, rows, ranked);
    });
    found.good = good;
    return found;
  }

  typename Candidates::Chunk packed(const Scratch& scratch, int64_t rows, bool ranked) const {
    typename Candidates::Chunk chunk;
    chunk.start = std::make_unique_for_overwrite<int32_t[]>(experts_ + 1);
    chunk.start[0] = 0;
    for (int64_t e = 0; e < experts_; ++e) {
      chunk.start[e + 1] = chunk.start[e] + scratch.count[e];
    }
    const auto pack = [&](const auto* lists) {
      auto together =
          std::make_unique_for_overwrite<std::remove_cvref_t<decltype(*lists)>[]>(chunk.start[experts_]);
      for (int64_t e = 0; e < experts_; ++e) {
        std::copy_n(lists + e * list_stride(rows), scratch.count[e], &together[chunk.start[e]]);
      }
      return together;
    };
    chunk.token = pack(scratch.token);
    chunk.p = pack(scratch.found);
    if (ranked) {
      chunk.rank = pack(scratch.rank);
    }
    return chunk;
  }

  // The `capacity` best candidates of an expert, or all of them, in the order of their rows.
  void take(const Candidates& found, int64_t e, int64_t capacity, int32_t* token, acc_t* weight) const {
    const int64_t count = found.count(e);
    if (count <= capacity) {
      for (const auto& chunk : found.chunks) {
        token = std::copy_n(&chunk.token[chunk.start[e]], chunk.count(e), token);
        weight = std::copy_n(&chunk.p[chunk.start[e]], chunk.count(e), weight);
      }
      return;
    }
    // One behind the other first: the pieces are short, and read one value at a time each would miss the
    // cache.
    const bool ranked = found.chunks[0].rank != nullptr;
    Arena size;
    Gathered(size, count, ranked);
    const ThreadScratch memory(size.used());
    Arena arena = memory.arena();
    const Gathered all(arena, count, ranked);
    int64_t at = 0;
    for (const auto& chunk : found.chunks) {
      const int64_t start = chunk.start[e], size = chunk.count(e);
      std::copy_n(&chunk.token[start], size, all.token + at);
      std::copy_n(&chunk.p[start], size, all.p + at);
      if (ranked) {
        std::copy_n(&chunk.rank[start], size, all.score + at);
      }
      at += size;
    }
    const acc_t bound = bound_of_best(all.score, count, capacity);
    int64_t ties = capacity - count_if(all.score, count, [&](acc_t x) { return x > bound; });
    for (int64_t i = 0, taken = 0; taken < capacity; ++i) {
      token[taken] = all.token[i];
      weight[taken] = all.p[i];
      const bool tied = all.score[i] == bound;
      taken += (all.score[i] > bound) | (tied & (ties > 0));
      ties -= tied;
    }
  }

  void allocate(const std::vector<int64_t>& offsets, SlotList& out) const {
    out.token = make_plain({offsets.back()}, at::kInt);
    out.weight = make_plain({offsets.back()}, c10::CppTypeToScalarType<acc_t>::value);
    out.expert_offsets = make_plain({experts_ + 1}, at::kInt);
    std::copy(offsets.begin(), offsets.end(), out.expert_offsets.mutable_data_ptr<int32_t>());
  }

  // A candidate takes about four cycles, as long as 16 multiply-adds on one vector.
  template <typename CandidatesOf, typename Place>
  void take_each(int64_t candidates, const CandidatesOf& of, int64_t capacity, const Place& place,
                 SlotList& out) const {
    int32_t* token = out.token.mutable_data_ptr<int32_t>();
    acc_t* weight = out.weight.mutable_data_ptr<acc_t>();
    run_each(experts_, 16 * candidates / experts_,
             [&](int64_t e) { take(of(e), e, capacity, token + place(e), weight + place(e)); });
  }

  // The slots of a router without groups.
  void take_all(const Candidates& found, int64_t capacity, SlotList& out) const {
    if (!found.good) {
      return;
    }
    std::vector<int64_t> offsets(experts_ + 1, 0);
    int64_t candidates = 0;
    for (int64_t e = 0; e < experts_; ++e) {
      const int64_t count = found.count(e);
      offsets[e + 1] = offsets[e] + std::min(count, capacity);
      candidates += count;
    }
    allocate(offsets, out);
    const auto place = [&](int64_t e) { return offsets[e]; };
    take_each(candidates, [&](int64_t) -> const Candidates& { return found; }, capacity, place, out);
  }

  template <typename Place>
  bool choose_in_group(int64_t begin, int64_t end, int64_t capacity, const Place& place,
                       SlotList& out) const {
    const int64_t size = end - begin;
    std::vector<acc_t> bounds = likely_bounds(begin, size, capacity);
    const Candidates found = collect(size, false, in_order(begin), reaching(bounds));
    if (!found.good) {
      return false;
    }
    // Where the sample misled, all tokens are candidates.
    int64_t candidates = 0;
    std::vector<bool> short_of(experts_, false);
    Candidates all;
    for (int64_t e = 0; e < experts_; ++e) {
      candidates += found.count(e);
      short_of[e] = found.count(e) < std::min(capacity, size);
      bounds[e] = short_of[e] ? acc_t(0) : kInfinity;
    }
    if (std::find(short_of.begin(), short_of.end(), true) != short_of.end()) {
      all = collect(size, false, in_order(begin), reaching(bounds));
    }
    const auto of = [&](int64_t e) -> const Candidates& { return short_of[e] ? all : found; };
    take_each(candidates, of, capacity, place, out);
    return true;
  }

  // A bound for each expert that its `capacity` best tokens almost surely reach, and few others do. From a
  // sample of the rows (Floyd and Rivest's selection): 65,536 rows of 64 experts are then read once, and
  // neither stored nor sorted.
  std::vector<acc_t> likely_bounds(int64_t begin, int64_t size, int64_t capacity) const {
    constexpr int64_t kSample = 1024, kWorthASample = 16 * kSample;
    std::vector<acc_t> bounds(padded(experts_), kInfinity);
    std::fill_n(bounds.begin(), experts_, acc_t(0));
    // Of the sample, this many are expected among the best; four standard deviations more make sure.
    const double expected = static_cast<double>(kSample) * static_cast<double>(capacity) / size;
    const int64_t wanted = static_cast<int64_t>(expected + 4 * std::sqrt(expected)) + 3;
    if (size < kWorthASample || wanted > kSample / 4) {
      return bounds;
    }
    // Spread evenly, but at no fixed distance: the rows of an image would beat with that.
    const auto row_of = [&](int64_t i) {
      const uint64_t place = static_cast<uint64_t>(i) * 0x9e3779b9u & 0xffffffffu;  // golden ratio
      return begin + static_cast<int64_t>(place * static_cast<uint64_t>(size) >> 32);
    };
    const Candidates sample = collect(kSample, false, row_of, reaching(bounds));
    if (!sample.good) {
      return bounds;
    }
    std::vector<acc_t> found(bounds);
    run_each(experts_, 16 * kSample, [&](int64_t e) {
      std::vector<acc_t> p;
      for (const auto& chunk : sample.chunks) {
        p.insert(p.end(), &chunk.p[chunk.start[e]], &chunk.p[chunk.start[e + 1]]);
      }
      found[e] = bound_of_best(p.data(), static_cast<int64_t>(p.size()), wanted);
    });
    return found;
  }

  Logits logits_;
  int64_t experts_;
};

}  // namespace

void expert_choice(const ExpertChoice& args, SlotList& out) {
  with_dtype_of(args.logits, [&](auto t) { Router<decltype(t)>(args.logits).expert_choice(args, out); });
}

void token_choice(const TokenChoice& args, SlotList& out) {
  with_dtype_of(args.logits, [&](auto t) { Router<decltype(t)>(args.logits).token_choice(args, out); });
}

void threshold_choice(const ThresholdChoice& args, SlotList& out) {
  with_dtype_of(args.logits, [&](auto t) { Router<decltype(t)>(args.logits).threshold_choice(args, out); });
}

}  // namespace pyvlm::CPU_CAPABILITY
