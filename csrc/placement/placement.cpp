// Rows are copied as bytes, each straight from where it lies to where it goes; only sums look at numbers.
#include "placement/placement.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/empty.h"
#include "placement/row_sums.h"
#include "placement/token_runs.h"

namespace pyvlm {
namespace {

constexpr int64_t kNewline = -1;

const at::Tensor& floating(const char* op, const char* name, const at::Tensor& t, int64_t dim,
                           at::ScalarType dtype) {
  TORCH_CHECK(
      t.dim() == dim && t.scalar_type() == dtype &&
          (dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf),
      op, ": ", name, " is ", t.scalar_type(), " ", t.sizes(), "; expected ", dim,
      " dimensions of float32, float64, bfloat16 or float16, the same type for all");
  return t;
}

// The features of a row lie side by side; rows, tokens of samples, may lie anywhere.
struct Rows {
  Rows(const char* op, const char* name, const at::Tensor& t, int64_t dim, at::ScalarType dtype)
      : held(floating(op, name, t, dim, dtype).size(-1) <= 1 || t.stride(-1) == 1 ? t : t.contiguous()),
        data(static_cast<const char*>(held.const_data_ptr())),
        sample_bytes(t.dim() == 3 ? held.stride(0) * held.element_size() : 0),
        token_bytes(held.stride(-2) * held.element_size()),
        row_bytes(held.size(-1) * held.element_size()) {}

  const char* at(int64_t sample, int64_t token) const {
    return data + sample * sample_bytes + token * token_bytes;
  }

  void copy(char* to, int64_t sample, int64_t token, int64_t count) const {
    const char* from = at(sample, token);
    if (token_bytes == row_bytes) {
      std::memcpy(to, from, count * row_bytes);
      return;
    }
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(to + i * row_bytes, from + i * token_bytes, row_bytes);
    }
  }

  at::Tensor held;
  const char* data;
  int64_t sample_bytes, token_bytes, row_bytes;
};

// Which feature rows, P side by side, each packed row is made of.
struct Index {
  Index(const char* op, const at::Tensor& index, int64_t num_features, bool newline)
      : held(index.to(at::kLong).contiguous()), data(held.const_data_ptr<int64_t>()), size(held.numel()) {
    TORCH_CHECK((index.scalar_type() == at::kInt || index.scalar_type() == at::kLong) &&
                    (index.dim() == 1 || index.dim() == 2),
                op, ": index is ", index.scalar_type(), " ", index.sizes(),
                "; expected int32 or int64, [S] or [S, P]");
    S = index.size(0);
    P = index.dim() == 2 ? index.size(1) : 1;
    if (size == 0) {
      return;
    }
    const auto [lowest, highest] = std::minmax_element(data, data + size);
    TORCH_CHECK_VALUE(*lowest >= (newline ? kNewline : 0) && *highest < num_features, op,
                      ": index runs from ", *lowest, " to ", *highest, "; there are ", num_features,
                      " feature rows, and ",
                      newline ? "only -1 stands for the newline" : "no newline was given");
  }

  at::Tensor held;
  const int64_t* data;
  int64_t size, S, P;
};

// What the placeholders take: feature rows in their order, or packed by an index.
struct ImageRows {
  ImageRows(const char* op, const at::Tensor& features, const std::optional<at::Tensor>& index,
            const std::optional<at::Tensor>& newline)
      : features(op, "features", features, 2, features.scalar_type()), count(features.size(0)) {
    if (newline.has_value()) {
      held_newline = floating(op, "newline", *newline, 1, features.scalar_type()).contiguous();
      TORCH_CHECK(newline->size(0) == features.size(1), op, ": newline is ", newline->sizes(),
                  " and features ", features.sizes(), "; expected the same width");
    }
    if (index.has_value()) {
      this->index.emplace(op, *index, count, newline.has_value());
      count = this->index->S;
      width = features.size(1) * this->index->P;
    } else {
      width = features.size(1);
    }
  }

  void copy(char* to, int64_t row, int64_t rows) const {
    if (!index.has_value()) {
      features.copy(to, 0, row, rows);
      return;
    }
    const auto* newline =
        static_cast<const char*>(held_newline.defined() ? held_newline.const_data_ptr() : nullptr);
    for (int64_t i = row * index->P; i < (row + rows) * index->P; ++i, to += features.row_bytes) {
      const int64_t from = index->data[i];
      std::memcpy(to, from == kNewline ? newline : features.at(0, from), features.row_bytes);
    }
  }

  Rows features;
  at::Tensor held_newline;
  std::optional<Index> index;
  int64_t count, width;
};

// A mask [B, L] of tokens [B, L, H], and their runs.
struct Placeholders {
  Placeholders(const char* op, const at::Tensor& image_mask, const at::Tensor& tokens, int64_t num_rows)
      : held(checked(op, image_mask, tokens).contiguous()),
        runs(held.const_data_ptr<bool>(), tokens.size(0), tokens.size(1),
             tokens.size(2) * tokens.element_size()) {
    TORCH_CHECK_VALUE(runs.placeholders() == num_rows, op, ": there are ", runs.placeholders(),
                      " image placeholders, but ", num_rows,
                      " image features; make the prompts and the images agree");
  }

  static const at::Tensor& checked(const char* op, const at::Tensor& image_mask, const at::Tensor& tokens) {
    TORCH_CHECK(tokens.dim() == 3 && image_mask.scalar_type() == at::kBool &&
                    image_mask.sizes() == tokens.sizes().slice(0, 2),
                op, ": image_mask is ", image_mask.scalar_type(), " ", image_mask.sizes(), " beside tokens ",
                tokens.sizes(), "; expected bool [B, L] of [B, L, H]");
    return image_mask;
  }

  at::Tensor held;
  TokenRuns runs;
};

char* data_of(const at::Tensor& t) { return static_cast<char*>(t.data_ptr()); }

at::Tensor gradient(bool needed, at::IntArrayRef sizes, const at::Tensor& grad) {
  return needed ? make_empty(sizes, grad.options()) : at::empty({0}, grad.options());
}

// The gradients of features and newline: each is the sum of the gradients of the parts that it went into.
// `parts` are those in the order of the index.
void sum_by_source(const std::vector<const char*>& parts, const Index& index, at::ScalarType dtype,
                   const at::Tensor& grad_features, const at::Tensor& grad_newline, int64_t num_features,
                   int64_t width) {
  // A counting sort, which keeps the order of equals. The newline, index -1, is the first source.
  std::vector<int64_t> end(num_features + 2, 0);
  for (int64_t i = 0; i < index.size; ++i) {
    ++end[index.data[i] + 2];
  }
  for (int64_t source = 1; source < num_features + 2; ++source) {
    end[source] += end[source - 1];
  }
  std::vector<const char*> sorted(index.size);
  for (int64_t i = 0; i < index.size; ++i) {
    sorted[end[index.data[i] + 1]++] = parts[i];
  }
  const auto sum = [&](int64_t source, char* out, int64_t begin_column, int64_t end_column) {
    const int64_t begin = source == 0 ? 0 : end[source - 1], count = end[source] - begin;
    const int64_t size = static_cast<int64_t>(c10::elementSize(dtype));
    const int64_t skipped = begin_column * size, bytes = (end_column - begin_column) * size;
    if (count == 0) {
      std::memset(out + skipped, 0, bytes);
    } else if (count == 1) {
      std::memcpy(out + skipped, sorted[begin] + skipped, bytes);
    } else {
      PYVLM_DISPATCH_ISA(sum_rows, {sorted.data() + begin, count, begin_column, end_column, out, dtype});
    }
  };
  const int64_t row_bytes = width * static_cast<int64_t>(c10::elementSize(dtype));
  if (grad_features.numel() > 0) {
    char* out = data_of(grad_features);
    TokenRuns(nullptr, 1, num_features, row_bytes).for_each([&](const TokenRun& run) {
      for (int64_t r = run.token; r < run.token + run.count; ++r) {
        sum(r + 1, out + r * row_bytes, 0, width);
      }
    });
  }
  if (grad_newline.numel() > 0) {
    constexpr int64_t kColumns = 512;  // of a task: all rows are one sum
    run_each((width + kColumns - 1) / kColumns, end[0] * kColumns * TokenRuns::kWorkOfAByte,
             [&](int64_t task) {
               sum(0, data_of(grad_newline), task * kColumns, std::min((task + 1) * kColumns, width));
             });
  }
}

}  // namespace

at::Tensor pack_image_tokens_cpu(const at::Tensor& features, const at::Tensor& index,
                                 const std::optional<at::Tensor>& newline) {
  const ImageRows rows("pack_image_tokens", features, index, newline);
  const at::Tensor out = make_empty({rows.count, rows.width}, features.options());
  const int64_t row_bytes = rows.width * out.element_size();
  TokenRuns(nullptr, 1, rows.count, row_bytes).for_each([&](const TokenRun& run) {
    rows.copy(data_of(out) + run.token * row_bytes, run.image_row, run.count);
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> pack_image_tokens_backward_cpu(const at::Tensor& grad,
                                                                  const at::Tensor& index,
                                                                  int64_t num_features, int64_t feature_width,
                                                                  std::array<bool, 2> needs) {
  constexpr auto op = "pack_image_tokens_backward";
  const Rows rows(op, "grad", grad, 2, grad.scalar_type());
  const Index packed(op, index, num_features, true);
  TORCH_CHECK(grad.sizes() == at::IntArrayRef({packed.S, packed.P * feature_width}), op, ": grad is ",
              grad.sizes(), "; expected [", packed.S, ", ", packed.P * feature_width, "]");
  const at::Tensor grad_features = gradient(needs[0], {num_features, feature_width}, grad);
  const at::Tensor grad_newline = gradient(needs[1], {feature_width}, grad);
  std::vector<const char*> parts(packed.size);
  for (int64_t i = 0; i < packed.size; ++i) {
    parts[i] = rows.at(0, i / packed.P) + i % packed.P * feature_width * grad.element_size();
  }
  sum_by_source(parts, packed, grad.scalar_type(), grad_features, grad_newline, num_features, feature_width);
  return {grad_features, grad_newline};
}

at::Tensor place_image_tokens_cpu(const at::Tensor& text, const at::Tensor& features,
                                  const at::Tensor& image_mask, const std::optional<at::Tensor>& index,
                                  const std::optional<at::Tensor>& newline) {
  constexpr auto op = "place_image_tokens";
  const Rows text_rows(op, "text", text, 3, features.scalar_type());
  const ImageRows image_rows(op, features, index, newline);
  TORCH_CHECK(image_rows.width == text.size(2), op, ": image rows have ", image_rows.width,
              " features, and text has ", text.size(2));
  const Placeholders placeholders(op, image_mask, text, image_rows.count);
  const at::Tensor out = make_empty(text.sizes(), text.options());
  placeholders.runs.for_each([&](const TokenRun& run) {
    char* to = data_of(out) + (run.sample * text.size(1) + run.token) * text_rows.row_bytes;
    if (run.is_image()) {
      image_rows.copy(to, run.image_row, run.count);
    } else {
      text_rows.copy(to, run.sample, run.token, run.count);
    }
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> place_image_tokens_backward_cpu(
    const at::Tensor& grad, const at::Tensor& image_mask, const std::optional<at::Tensor>& index,
    int64_t num_features, int64_t feature_width, std::array<bool, 3> needs) {
  constexpr auto op = "place_image_tokens_backward";
  const Rows rows(op, "grad", grad, 3, grad.scalar_type());
  std::optional<Index> packed;
  if (index.has_value()) {
    packed.emplace(op, *index, num_features, true);
  }
  const int64_t P = packed.has_value() ? packed->P : 1;
  TORCH_CHECK(grad.size(2) == P * feature_width, op, ": grad has ", grad.size(2), " features a token, and ",
              P, " feature rows have ", P * feature_width);
  const Placeholders placeholders(op, image_mask, grad, packed.has_value() ? packed->S : num_features);
  const at::Tensor grad_text = gradient(needs[0], grad.sizes(), grad);
  const at::Tensor grad_features = gradient(needs[1], {num_features, feature_width}, grad);
  const at::Tensor grad_newline = gradient(needs[2], {feature_width}, grad);
  const bool sums = packed.has_value() && (needs[1] || needs[2]);
  std::vector<const char*> parts(sums ? packed->size : 0);
  placeholders.runs.for_each([&](const TokenRun& run) {
    if (needs[0]) {
      char* to = data_of(grad_text) + (run.sample * grad.size(1) + run.token) * rows.row_bytes;
      if (run.is_image()) {
        std::memset(to, 0, run.count * rows.row_bytes);
      } else {
        rows.copy(to, run.sample, run.token, run.count);
      }
    }
    if (!run.is_image()) {
      return;
    }
    if (sums) {
      for (int64_t i = 0; i < run.count * P; ++i) {
        parts[run.image_row * P + i] =
            rows.at(run.sample, run.token + i / P) + i % P * feature_width * grad.element_size();
      }
    } else if (needs[1]) {
      rows.copy(data_of(grad_features) + run.image_row * rows.row_bytes, run.sample, run.token, run.count);
    }
  });
  if (sums) {
    sum_by_source(parts, *packed, grad.scalar_type(), grad_features, grad_newline, num_features,
                  feature_width);
  } else if (needs[2]) {
    std::memset(data_of(grad_newline), 0, grad_newline.nbytes());
  }
  return {grad_text, grad_features, grad_newline};
}

at::Tensor add_at_image_tokens_cpu(const at::Tensor& hidden, const at::Tensor& updates,
                                   const at::Tensor& image_mask) {
  constexpr auto op = "add_at_image_tokens";
  const Rows hidden_rows(op, "hidden", hidden, 3, updates.scalar_type());
  const Rows update_rows(op, "updates", updates, 2, updates.scalar_type());
  TORCH_CHECK(updates.size(1) == hidden.size(2), op, ": updates have ", updates.size(1),
              " features, and hidden has ", hidden.size(2));
  const Placeholders placeholders(op, image_mask, hidden, updates.size(0));
  const at::Tensor out = make_empty(hidden.sizes(), hidden.options());
  placeholders.runs.for_each([&](const TokenRun& run) {
    char* to = data_of(out) + (run.sample * hidden.size(1) + run.token) * hidden_rows.row_bytes;
    if (!run.is_image()) {
      hidden_rows.copy(to, run.sample, run.token, run.count);
      return;
    }
    for (int64_t i = 0; i < run.count; ++i, to += hidden_rows.row_bytes) {
      const char* both[] = {hidden_rows.at(run.sample, run.token + i), update_rows.at(0, run.image_row + i)};
      PYVLM_DISPATCH_ISA(sum_rows, {both, 2, 0, hidden.size(2), to, hidden.scalar_type()});
    }
  });
  return out;
}

at::Tensor add_at_image_tokens_backward_cpu(const at::Tensor& grad, const at::Tensor& image_mask,
                                            int64_t num_updates) {
  constexpr auto op = "add_at_image_tokens_backward";
  const Rows rows(op, "grad", grad, 3, grad.scalar_type());
  const Placeholders placeholders(op, image_mask, grad, num_updates);
  const at::Tensor grad_updates = make_empty({num_updates, grad.size(2)}, grad.options());
  placeholders.runs.for_each([&](const TokenRun& run) {
    if (run.is_image()) {
      rows.copy(data_of(grad_updates) + run.image_row * rows.row_bytes, run.sample, run.token, run.count);
    }
  });
  return grad_updates;
}

}  // namespace pyvlm
