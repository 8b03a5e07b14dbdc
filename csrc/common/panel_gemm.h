// Products of two matrices, larger than the caches: one loop that multiplies, whatever its operands come
// from.
//
// One operand of a product is resident: packed beforehand, in groups of 32 rows or columns, of which a chunk
// stays in L2. The other, mostly weights, streams past it: panels of 64, packed a few hundred
// channels deep.
// Each panel is so read once a chunk, and nothing but tiles is ever padded.
#pragma once

#include <algorithm>

#include "common/arena.h"
#include "common/pack.h"
#include "common/parallel.h"

namespace pyvlm::CPU_CAPABILITY {

inline constexpr int64_t kGroup = 32, kPanel = 64;
// Slots, or columns, that are resident at once. With 256 the weights are packed twice as often: backwards of
// MoE-LLaVA's layer took 5 % more time and of 64 small experts 10 % more, its forward 2 % less.
inline constexpr int64_t kChunk = 512;
inline constexpr int64_t kPanelsAtOnce = 4;  // whose sums wait in L2 while the depth is worked through

// Operands of one size, one behind the other.
template <typename Gemm>
struct Operands {
  using op_t = typename Gemm::op_t;
  op_t* data = nullptr;
  int64_t size = 0, ld = 0, plane = 0;

  Operands() = default;
  Operands(Arena& arena, int64_t count, int64_t operand_size, int64_t operand_ld)
      : data(arena.take<op_t>(Gemm::kPlanes * count * operand_size)),
        size(operand_size),
        ld(operand_ld),
        plane(count * operand_size) {}
  Operand<op_t> operator[](int64_t i) const { return {data + i * size, ld, plane}; }
};

template <typename Gemm>
struct Blocking {
  static constexpr int64_t kBytes = sizeof(typename Gemm::op_t) * Gemm::kPlanes;
  // Channels of a panel that are packed and multiplied at once.
  static constexpr int64_t kStep = Gemm::kPanelBytes / (kPanel * kBytes) / 32 * 32;

  // Channels of a chunk that are resident: half of L2.
  static int64_t depth(int64_t K) {
    const int64_t parts = (K * kChunk * kBytes + (1 << 20) - 1) / (1 << 20);
    return round_up((K + parts - 1) / std::max<int64_t>(parts, 1), kStep);
  }
};

template <typename Gemm>
struct PanelScratch {
  Operand<typename Gemm::op_t> panel;
  typename Gemm::acc_t* sums;  // [kPanelsAtOnce, groups of a chunk, a panel times a group]

  explicit PanelScratch(Arena& arena) {
    const int64_t size = kPanelsAtOnce * kPanel * Blocking<Gemm>::kStep;
    panel = {arena.take<typename Gemm::op_t>(Gemm::kPlanes * size), 0, size};
    sums = arena.take<typename Gemm::acc_t>(kPanelsAtOnce * kChunk * kPanel);
  }
  typename Gemm::acc_t* sum(int64_t panel, int64_t group) const {
    return sums + (panel * (kChunk / kGroup) + group) * kGroup * kPanel;
  }
};

// Calls f(begin, end) for pieces of the depth, of which as much of a chunk as is resident is worked through.
template <typename Gemm, typename F>
void for_depth(const PanelScratch<Gemm>& x, int64_t K, const F& f) {
  if (K == 0) {
    std::fill(x.sums, x.sums + kPanelsAtOnce * kChunk * kPanel, typename Gemm::acc_t(0));
    return;
  }
  const int64_t depth = Blocking<Gemm>::depth(K);
  for (int64_t begin = 0; begin < K; begin += depth) {
    f(begin, std::min(begin + depth, K));
  }
}

// A panel of A: rows as they lie where they are an operand already, else packed. Of a core's AMX rate on
// 64 x 32 x 256 that took 20 to 30 %.
template <typename Gemm, typename scalar_t>
Operand<typename Gemm::op_t> panel_of_rows(const Operand<typename Gemm::op_t>& scratch, const scalar_t* from,
                                           int64_t ld, int64_t rows, int64_t cols, int64_t depth) {
  if constexpr (std::is_same_v<scalar_t, typename Gemm::op_t>) {
    if (rows >= kPanel && cols >= depth) {
      return {const_cast<scalar_t*>(from), ld};
    }
  }
  pack_a<Gemm>(scratch, from, ld, std::min(rows, kPanel), std::min(cols, depth), kPanel, depth);
  return scratch;
}

// Sums of `panels` panels of A with `groups` resident groups of B: tiles [panel, group].
// operand(scratch, i, k, count) is channels k to k + count of panel i, in scratch memory or elsewhere. With
// `accumulate` the sums are added to.
template <typename Gemm, typename Panel>
void multiply_streamed_a(const PanelScratch<Gemm>& x, int64_t panels, int64_t groups, int64_t K,
                         const Operand<typename Gemm::op_t>& resident, int64_t group_size,
                         const Panel& operand, bool accumulate = false) {
  const Operand<typename Gemm::op_t> scratch{x.panel.data, Blocking<Gemm>::kStep, x.panel.plane};
  for_depth<Gemm>(x, K, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < panels; ++i) {
      for (int64_t k = begin; k < end; k += Blocking<Gemm>::kStep) {
        const int64_t count = std::min(Blocking<Gemm>::kStep, end - k);
        const auto panel = operand(scratch, i, k, count);
        for (int64_t g = 0; g < groups; ++g) {
          Gemm::multiply({kPanel, kGroup, count, panel, resident.from(g * group_size + k * kGroup),
                          x.sum(i, g), kGroup, accumulate || k > 0});
        }
      }
    }
  });
}

// Sums of `groups` resident groups of A with `panels` panels of B: tiles [group, panel].
// pack(to, k, count) packs channels k to k + count of all panels, a panel after another: they are parts of
// the same rows, and of one alone each row would be two cache lines of another page.
template <typename Gemm, typename Pack>
void multiply_streamed_b(const PanelScratch<Gemm>& x, int64_t panels, int64_t groups, int64_t K,
                         const Operand<typename Gemm::op_t>& resident, int64_t group_size, const Pack& pack) {
  const Operand<typename Gemm::op_t> scratch{x.panel.data, kPanel, x.panel.plane};
  for_depth<Gemm>(x, K, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; k += Blocking<Gemm>::kStep) {
      const int64_t count = std::min(Blocking<Gemm>::kStep, end - k);
      pack(scratch, k, count);
      for (int64_t i = 0; i < panels; ++i) {
        for (int64_t g = 0; g < groups; ++g) {
          Gemm::multiply({kGroup, kPanel, count, resident.from(g * group_size + k * kGroup),
                          scratch.from(i * kPanel * Blocking<Gemm>::kStep), x.sum(i, g), kPanel, k > 0});
        }
      }
    }
  });
}

// Calls work(scratch, i, first_panel, panels) for all panels of each of `count` chunks, in tasks of a few
// panels. Chunks of an expert come one after the other, so that threads at work share its weights.
template <typename Scratch, typename Work>
void for_panels(int64_t count, int64_t panels, int64_t work_of_panel, const Work& work) {
  const int64_t rounds = (panels + kPanelsAtOnce - 1) / kPanelsAtOnce;
  const int64_t parts = std::clamp<int64_t>(8 * at::get_num_threads() / std::max<int64_t>(count, 1), 1,
                                            std::max<int64_t>(rounds, 1));
  Arena size;
  Scratch measured(size);
  run_tasks(count * parts, work_of_panel * panels / parts, [&](TaskQueue& queue) {
    const ThreadScratch memory(size.used());
    Arena arena = memory.arena();
    const Scratch scratch(arena);
    for (int64_t task = queue.next(); task >= 0; task = queue.next()) {
      const int64_t i = task % count, part = task / count;
      for (int64_t round = rounds * part / parts; round < rounds * (part + 1) / parts; ++round) {
        const int64_t first = round * kPanelsAtOnce;
        work(scratch, i, first, std::min(kPanelsAtOnce, panels - first));
      }
    }
  });
}

// Where bf16 rows are packed in pairs, the columns at even places of each 32 come before those at odd ones:
// in products, and in vectors of two that stand for consecutive columns of a row.
template <typename scalar_t, typename Gemm>
inline constexpr bool kSplitColumns = false;
#if defined(CPU_CAPABILITY_AVX512)
template <typename Gemm>
  requires(Gemm::kVnni == 2)
inline constexpr bool kSplitColumns<at::BFloat16, Gemm> = true;
#endif

// B operands of [padded_rows, padded_cols] of rows as they stand, of which there may be more or fewer: panels
// of `width` columns, `size` apart.
template <typename Gemm, typename scalar_t>
void pack_rows(const Operand<typename Gemm::op_t>& to, int64_t width, int64_t size, const scalar_t* from,
               int64_t ld, int64_t rows, int64_t cols, int64_t padded_rows, int64_t padded_cols) {
  if constexpr (!kSplitColumns<scalar_t, Gemm>) {
    for (int64_t c = 0; c < padded_cols; c += width) {
      pack_b<Gemm>(to.from(c / width * size), from + c, ld, std::clamp<int64_t>(rows, 0, padded_rows),
                   std::clamp<int64_t>(cols - c, 0, width), padded_rows, width);
    }
  } else {
    for (int64_t i = 0; i < padded_rows; i += 2) {
      for (int64_t c = 0; c < padded_cols; c += kGroup) {
        const scalar_t* row = from + i * ld + c;
        scalar_t* out = to.data + c / width * size + i * to.ld + c % width * 2;
        if (i + 2 <= rows && c + kGroup <= cols) {
          interleave_split(out, row, row + ld);
          continue;
        }
        scalar_t padded[2][kGroup] = {};
        for (int64_t j = 0; j < std::clamp<int64_t>(rows - i, 0, 2); ++j) {
          std::copy(row + j * ld, row + j * ld + std::clamp<int64_t>(cols - c, 0, kGroup), padded[j]);
        }
        interleave_split(out, padded[0], padded[1]);
      }
    }
  }
}

// `count` consecutive elements of a row, at most two vectors, zeros behind them.
template <typename Gemm, typename scalar_t>
inline void load_columns(const scalar_t* from, int64_t count, Vec<typename Gemm::acc_t>& x0,
                         Vec<typename Gemm::acc_t>& x1) {
  constexpr int64_t step = 2 * Vec<typename Gemm::acc_t>::size();
  scalar_t padded[step] = {};
  if (count < step) {
    std::copy(from, from + std::max<int64_t>(count, 0), padded);
    from = padded;
  }
  if constexpr (kSplitColumns<scalar_t, Gemm>) {
    load_split(from, x0, x1);
  } else {
    load_two(from, x0, x1);
  }
}

// The other way; what is more than `count` is left out.
template <typename Gemm, typename scalar_t>
inline void store_columns(scalar_t* to, int64_t count, const Vec<typename Gemm::acc_t>& x0,
                          const Vec<typename Gemm::acc_t>& x1) {
  using acc_t = typename Gemm::acc_t;
  constexpr int64_t step = 2 * Vec<acc_t>::size();
  scalar_t padded[step];
  scalar_t* out = count < step ? padded : to;
  if constexpr (kSplitColumns<scalar_t, Gemm>) {
    store_pair(out, x0, x1);
  } else {
    acc_t sums[step];
    store_row(sums, x0, x1);
    at::vec::convert(sums, out, step);
  }
  if (count < step) {
    std::copy(padded, padded + std::max<int64_t>(count, 0), to);
  }
}

}  // namespace pyvlm::CPU_CAPABILITY
