#include "fusion/fuse_grids.h"

#include <ATen/ops/_adaptive_avg_pool2d_backward.h>
#include <ATen/ops/adaptive_avg_pool1d.h>
#include <ATen/ops/adaptive_avg_pool2d.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/upsample_bilinear2d.h>
#include <ATen/ops/upsample_bilinear2d_backward.h>
#include <ATen/ops/upsample_linear1d.h>
#include <ATen/ops/upsample_nearest1d.h>
#include <ATen/ops/upsample_nearest2d.h>
#include <ATen/ops/upsample_nearest2d_backward.h>

#include "linear/linear.h"

namespace pyvlm {
namespace {

struct Grid {
  int64_t rows, columns;

  int64_t tokens() const { return rows * columns; }
  bool operator==(const Grid&) const = default;
};

// Resizing of maps [N, T, C] and its gradient, in fp32 for half precision, on maps whose channels come last.
// torch's average pools sum in fp32 by themselves: widened first, four maps of 4,096 bf16 tokens took 15
// times as long.
struct Resize {
  std::string_view mode;
  bool align_corners;

  at::Tensor forward(const at::Tensor& x, Grid from, Grid to) const {
    const at::Tensor map = unfold(mode == "area" ? x : widened(x), from);
    const std::vector<int64_t> size = {to.rows, to.columns};
    const at::Tensor resized = mode == "bilinear"  ? at::upsample_bilinear2d(map, size, align_corners)
                               : mode == "nearest" ? at::upsample_nearest2d(map, size)
                                                   : at::adaptive_avg_pool2d(map, size);
    return fold(resized, x.scalar_type());
  }

  at::Tensor backward(const at::Tensor& grad, Grid from, Grid to) const {
    if (!grad.is_cpu()) {
      return backward_by_products(grad, from, to);
    }
    const at::Tensor map = unfold(widened(grad), to);
    const std::vector<int64_t> size = {to.rows, to.columns};
    const std::vector<int64_t> input = {map.size(0), map.size(1), from.rows, from.columns};
    const at::Tensor resized =
        mode == "bilinear"  ? at::upsample_bilinear2d_backward(map, size, input, align_corners)
        : mode == "nearest" ? at::upsample_nearest2d_backward(map, size, input)
                            : at::_adaptive_avg_pool2d_backward(
                                  map, at::empty(input, map.options(), at::MemoryFormat::ChannelsLast));
    return fold(resized, grad.scalar_type());
  }

 private:
  // A side at a time, as a product with the resize's own matrix: of CUDA's kernels those of bilinear and area
  // add by atomics, in another order each time. (On the CPU products take three times as long as kernels.)
  at::Tensor backward_by_products(const at::Tensor& grad, Grid from, Grid to) const {
    const at::Tensor wide = widened(grad).contiguous();
    const int64_t N = grad.size(0), C = grad.size(2);
    const at::Tensor rows =
        at::matmul(matrix(from.rows, to.rows, wide.options()), wide.view({N, to.rows, to.columns * C}));
    const at::Tensor both = at::matmul(matrix(from.columns, to.columns, wide.options()),
                                       rows.view({N, from.rows, to.columns, C}));
    return both.view({N, from.tokens(), C}).to(grad.scalar_type());
  }
  // [from, to]: what each place of a side gives to each place of the resized one, by resizing unit vectors.
  at::Tensor matrix(int64_t from, int64_t to, const at::TensorOptions& options) const {
    const at::Tensor unit = at::eye(from, options).unsqueeze(0);
    const at::Tensor resized = mode == "bilinear"  ? at::upsample_linear1d(unit, {to}, align_corners)
                               : mode == "nearest" ? at::upsample_nearest1d(unit, {to})
                                                   : at::adaptive_avg_pool1d(unit, {to});
    return resized.squeeze(0);
  }
  static at::Tensor widened(const at::Tensor& x) {
    return x.to(x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  }
  // The rows are split before the channels move: the other way one map alone loses the strides by which torch
  // knows that its channels come last, and is copied twice.
  static at::Tensor unfold(const at::Tensor& x, Grid grid) {
    return x.unflatten(1, {grid.rows, grid.columns}).permute({0, 3, 1, 2});
  }
  static at::Tensor fold(const at::Tensor& map, at::ScalarType dtype) {
    return map.flatten(2).transpose(1, 2).to(dtype);
  }
};

// One encoder's map among those of a call.
struct Source {
  Grid grid;
  int64_t channel, channels;  // where its channels begin among all
  bool same, project_first;
};

struct Fusion {
  Resize resize;
  Grid target;
  std::vector<Source> sources;
  int64_t channels = 0;

  Fusion(at::TensorList features, at::IntArrayRef grids, at::IntArrayRef to,
         const std::optional<at::Tensor>& weight, std::string_view mode, bool align_corners)
      : resize{mode, align_corners}, target{0, 0} {
    TORCH_CHECK(!features.empty() && grids.size() == 2 * features.size() && to.size() == 2,
                "fuse_grids: ", features.size(), " features, grids ", grids, ", target ", to,
                "; expected two numbers for each map and for the target");
    TORCH_CHECK_VALUE(mode == "bilinear" || mode == "nearest" || mode == "area", "fuse_grids: mode is '",
                      mode, "'; expected bilinear, nearest or area");
    target = {to[0], to[1]};
    for (size_t i = 0; i < features.size(); ++i) {
      const at::Tensor& x = features[i];
      const Grid grid{grids[2 * i], grids[2 * i + 1]};
      TORCH_CHECK(x.dim() == 3 && x.size(0) == features[0].size(0) && x.size(1) == grid.tokens() &&
                      x.scalar_type() == features[0].scalar_type(),
                  "fuse_grids: features[", i, "] is ", x.scalar_type(), " ", x.sizes(), " on a grid of ",
                  grid.rows, " x ", grid.columns, "; expected ", features[0].scalar_type(), " [",
                  features[0].size(0), ", ", grid.tokens(), ", C]");
      // Both are linear, one over tokens and one over channels. The product comes first where it has fewer
      // tokens and leaves no more channels to resize: a resized number cost as much as 1,000 multiply-adds,
      // and to resize 2,048 outputs in place of 1,024 and 256 channels took Eagle's maps 1.3 (fp32) to 2
      // times (bf16) as long.
      const bool same = grid == target;
      const bool narrows = weight.has_value() && weight->size(0) <= x.size(2);
      sources.push_back(
          {grid, channels, x.size(2), same, !same && narrows && grid.tokens() < target.tokens()});
      channels += x.size(2);
    }
    TORCH_CHECK(!weight.has_value() || (weight->dim() == 2 && weight->size(1) == channels),
                "fuse_grids: weight is ", weight->sizes(), "; expected [H, ", channels, "]");
  }

  at::Tensor weight_of(const at::Tensor& weight, const Source& s) const {
    return weight.narrow(1, s.channel, s.channels);
  }
  at::Tensor resized(const at::Tensor& x, const Source& s) const {
    return s.same ? x : resize.forward(x, s.grid, target);
  }
  at::Tensor resized_back(const at::Tensor& grad, const Source& s) const {
    return s.same ? grad : resize.backward(grad, s.grid, target);
  }
};

at::Tensor project(const at::Tensor& x, const at::Tensor& weight) {
  const at::Tensor y = at::empty({x.size(0), x.size(1), weight.size(0)}, x.options());
  linear_into(y, x, weight, std::nullopt);
  return y;
}

at::Tensor project_back(const at::Tensor& grad, const at::Tensor& weight) {
  const at::Tensor x = at::empty({grad.size(0), grad.size(1), weight.size(1)}, grad.options());
  linear_grad_x_into(x, grad, weight);
  return x;
}

}  // namespace

at::Tensor fuse_grids(at::TensorList features, at::IntArrayRef grids, at::IntArrayRef to,
                      const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                      std::string_view mode, bool align_corners) {
  const Fusion fusion(features, grids, to, weight, mode, align_corners);
  const int64_t N = features[0].size(0), width = weight.has_value() ? weight->size(0) : fusion.channels;
  const at::Tensor y = at::empty({N, fusion.target.tokens(), width}, features[0].options());
  // What is projected at its own size comes last: those that write in place need something to begin with.
  bool written = false;
  for (const bool project_first : {false, true}) {
    for (size_t i = 0; i < features.size(); ++i) {
      const Source& s = fusion.sources[i];
      if (!weight.has_value()) {
        if (!project_first) {
          y.narrow(2, s.channel, s.channels).copy_(fusion.resized(features[i], s));
        }
      } else if (s.project_first == project_first) {
        const at::Tensor columns = fusion.weight_of(*weight, s);
        if (!project_first) {
          linear_into(y, fusion.resized(features[i], s), columns, written ? std::nullopt : bias, written);
        } else {
          const at::Tensor part = fusion.resized(project(features[i], columns), s);
          written            ? y.add_(part)
          : bias.has_value() ? at::add_out(const_cast<at::Tensor&>(y), part, *bias)
                             : y.copy_(part);
        }
        written = true;
      }
    }
  }
  return y;
}

std::tuple<std::vector<at::Tensor>, at::Tensor, at::Tensor> fuse_grids_backward(
    const at::Tensor& grad_y, at::TensorList features, at::IntArrayRef grids, at::IntArrayRef to,
    const std::optional<at::Tensor>& weight, std::string_view mode, bool align_corners,
    const std::vector<bool>& needs) {
  const Fusion fusion(features, grids, to, weight, mode, align_corners);
  TORCH_CHECK(needs.size() == features.size() + 2, "fuse_grids_backward: needs has ", needs.size(),
              " values; expected ", features.size() + 2);
  const auto none = [&] { return at::empty({0}, grad_y.options()); };
  const bool needs_weight = needs[features.size()] && weight.has_value();
  at::Tensor grad_weight = needs_weight ? at::empty(weight->sizes(), weight->options()) : none();
  std::vector<at::Tensor> grads;
  for (size_t i = 0; i < features.size(); ++i) {
    const Source& s = fusion.sources[i];
    if (!weight.has_value()) {
      const auto grad_x = [&] {
        const at::Tensor grad = grad_y.narrow(2, s.channel, s.channels);
        // Of the only map it is grad_y itself, and an op's result may not be an argument of it.
        return s.same ? grad.clone(at::MemoryFormat::Contiguous) : fusion.resized_back(grad, s).contiguous();
      };
      grads.push_back(needs[i] ? grad_x() : none());
      continue;
    }
    if (!needs[i] && !needs_weight) {
      grads.push_back(none());
      continue;
    }
    const at::Tensor grad = s.project_first ? fusion.resized_back(grad_y, s) : grad_y;
    const auto grad_x = [&] {
      const at::Tensor x = project_back(grad, fusion.weight_of(*weight, s));
      return s.project_first ? x : fusion.resized_back(x, s).contiguous();
    };
    grads.push_back(needs[i] ? grad_x() : none());
    if (needs_weight) {
      linear_grad_weight_into(fusion.weight_of(grad_weight, s), grad,
                              s.project_first ? features[i] : fusion.resized(features[i], s));
    }
  }
  return {grads, grad_weight, needs[features.size() + 1] ? linear_grad_bias(grad_y) : none()};
}

at::Tensor patches_to_token(at::TensorList features, at::TensorList weights, at::TensorList biases,
                            at::IntArrayRef patches) {
  TORCH_CHECK(!features.empty() && weights.size() == features.size() && biases.size() == features.size() &&
                  patches.size() == features.size(),
              "patches_to_token: ", features.size(), " features, ", weights.size(), " weights, ",
              biases.size(), " biases, ", patches.size(), " patches; expected one of each an expert");
  int64_t tokens = 0;
  for (size_t i = 0; i < features.size(); ++i) {
    const at::Tensor &x = features[i], &weight = weights[i];
    TORCH_CHECK(x.dim() == 3 && weight.dim() == 2 && patches[i] > 0 && x.size(1) % patches[i] == 0 &&
                    x.size(0) == features[0].size(0) && weight.size(0) == weights[0].size(0) &&
                    weight.size(1) == patches[i] * x.size(2),
                "patches_to_token: features[", i, "] is ", x.sizes(), " and weights[", i, "] ",
                weight.sizes(), " for ", patches[i], " patches; expected [N, T, C] and [H, patches C]");
    tokens += x.size(1) / patches[i];
  }
  const at::Tensor y = at::empty({features[0].size(0), tokens, weights[0].size(0)}, features[0].options());
  int64_t first = 0;
  for (size_t i = 0; i < features.size(); ++i) {
    const at::Tensor& x = features[i];
    const int64_t count = x.size(1) / patches[i];
    linear_into(y.narrow(1, first, count), x.reshape({x.size(0), count, weights[i].size(1)}), weights[i],
                biases[i].numel() > 0 ? std::optional(biases[i]) : std::nullopt);
    first += count;
  }
  return y;
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>>
patches_to_token_backward(const at::Tensor& grad_y, at::TensorList features, at::TensorList weights,
                          at::IntArrayRef patches, const std::vector<bool>& needs) {
  const size_t experts = features.size();
  TORCH_CHECK(needs.size() == 3 * experts, "patches_to_token_backward: needs has ", needs.size(),
              " values; expected ", 3 * experts);
  const auto none = [&] { return at::empty({0}, grad_y.options()); };
  std::vector<at::Tensor> grad_x, grad_weight, grad_bias;
  int64_t first = 0;
  for (size_t i = 0; i < experts; ++i) {
    const at::Tensor &x = features[i], &weight = weights[i];
    const int64_t count = x.size(1) / patches[i];
    const at::Tensor grad = grad_y.narrow(1, first, count);
    grad_x.push_back(needs[i] ? project_back(grad, weight).view(x.sizes()) : none());
    grad_weight.push_back(needs[experts + i] ? at::empty(weight.sizes(), weight.options()) : none());
    if (needs[experts + i]) {
      linear_grad_weight_into(grad_weight.back(), grad, x.reshape({x.size(0), count, weight.size(1)}));
    }
    grad_bias.push_back(needs[2 * experts + i] ? linear_grad_bias(grad) : none());
    first += count;
  }
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace pyvlm
