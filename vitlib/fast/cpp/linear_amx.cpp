// Linear layers of bfloat16, and of uint8 inputs and int8 weights, by the tiles of AMX.
//
// How data flows: the products of all inputs are added to the four tiles of a block. Then its sums
// are written to a small memory, and while the next block is multiplied, what follows is computed
// of them (linear.h). A thread takes some rows and some columns; weights that exceed a part of the
// L2 cache are taken in parts, each for all rows.
//
// Weights are packed: for 32 columns and 64 bytes of inputs two tiles of 16 columns, in which each
// row holds 2 (or 4) inputs of each column. What is missing to whole blocks is zero.
//
// Shapes: M rows, K inputs, N outputs.

namespace {

// The rows of a matrix.
template <typename N>
struct MatrixRows {
  using Number = N;
  static constexpr bool kInMemory = true;
  const Number* x;
  int64_t inputs;

  const Number* at(int64_t block) const { return x + block * kBlock * inputs; }

  // Copy inputs from the first on of a block's rows, of which `count` exist, to rows of a length.
  void copy(int64_t block, int64_t count, int64_t first, Number* to, int64_t length) const {
    for (int64_t i = 0; i < count; ++i)
      std::copy_n(at(block) + i * inputs + first, inputs - first, to + i * length);
  }
};

// The patches of images (B, C, H, W) in float32, each number as a sum of two in bfloat16. A row has
// the first ones of a patch, the second ones, and the first ones again: by weights that are split
// as well, and without the product of both second ones, the result is nearly that of float32.
struct PatchRows {
  using Number = bfloat16;
  static constexpr bool kInMemory = false;
  const float* pixels;
  int64_t channels, height, width, down, across;  // of an image, and of a patch
  int64_t inputs;

  void copy(int64_t block, int64_t count, int64_t, Number* to, int64_t length) const {
    const int64_t grid_width = width / across, patches = height / down * grid_width;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t patch = (block * kBlock + i) % patches;
      const int64_t image = (block * kBlock + i) / patches;
      const float* const from = pixels + image * channels * height * width +
                                patch / grid_width * down * width + patch % grid_width * across;
      Number* row = to + i * length;
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t y = 0; y < down; ++y, row += across)
          split(from + (c * height + y) * width, row);
    }
  }

 private:
  void split(const float* from, Number* to) const {
    const int64_t size = inputs / 3;
    for (int64_t x = 0; x < across; x += kLanes) {
      const __mmask16 lanes = first_lanes(across - x);
      const __m512 number = _mm512_maskz_loadu_ps(lanes, from + x);
      const __m256i first = (__m256i)_mm512_cvtneps_pbh(number);
      const __m256i second = (__m256i)_mm512_cvtneps_pbh(_mm512_sub_ps(number, widen(first)));
      _mm256_mask_storeu_epi16(to + x, lanes, first);
      _mm256_mask_storeu_epi16(to + size + x, lanes, second);
      _mm256_mask_storeu_epi16(to + 2 * size + x, lanes, first);
    }
  }
};

// Rows: of bfloat16 or uint8_t, as above. Out: float, bfloat16 or uint8_t.
template <typename Rows, typename Out, Then kThen>
class LinearKernel {
  using Number = typename Rows::Number;

 public:
  LinearKernel(const Layer& layer, const Rows& input)
      : layer_(layer), input_(input), steps_((input.inputs + kNumbers - 1) / kNumbers),
        rows_of_step_((kBlock + steps_ - 1) / steps_),
        arena_(kBlock * (steps_ + 1) * kTileRow + Finish::kBytes),
        rows_(arena_.take<Number>(kBlock * steps_ * kNumbers)),
        ends_(arena_.take<Number>(kBlock * kNumbers)),
        finisher_(layer, arena_) {
    if (!Rows::kInMemory) std::fill_n(rows_, kBlock * steps_ * kNumbers, Number(0));
    std::fill_n(ends_, kBlock * kNumbers, Number(0));
  }

  // Compute blocks of rows and of columns, from the first to before the last.
  void run(int64_t row, int64_t last_row, int64_t column, int64_t last_column) {
    const int64_t panel = steps_ * kStepBytes;  // weights of a block
    const bool few_rows =
        Rows::kInMemory && (last_row - row) * kBlock * steps_ * kTileRow <= kCached;
    const int64_t part = few_rows ? 1 : std::max<int64_t>(1, kCached / panel);
    if (row == last_row) return;
    for (int64_t first = column; first < last_column; first += part) {
      const int64_t last = std::min(last_column, first + part);
      soon_.start(layer_.weight + last * panel,
                  layer_.weight + std::min(last_column, last + part) * panel,
                  (last - first) * (last_row - row) * steps_);
      for (int64_t i = row; i < last_row; ++i) {
        const int64_t count = std::min(kBlock, layer_.rows - i * kBlock);
        find_rows(i, count);
        for (int64_t j = first; j < last; ++j) {
          if (count > kRows) {
            multiply<true>(layer_.weight + j * panel);
          } else {
            multiply<false>(layer_.weight + j * panel);
          }
          finisher_.start(i, j, count);
        }
      }
    }
    finisher_.finish(kBlock);
  }

 private:
  using Finish = Finisher<sizeof(Number) == 1, Out, kThen>;
  static constexpr int64_t kNumbers = kTileRow / sizeof(Number);  // in a row of a tile

  // Set where a block of rows is. Rows that do not all exist, or not in memory, are copied; of rows
  // whose end is not that of a tile only the end is.
  void find_rows(int64_t block, int64_t count) {
    a_steps_ = steps_;
    distance_ = steps_ * kNumbers;
    a_ = rows_;
    if constexpr (Rows::kInMemory) {
      if (count == kBlock) {
        a_ = input_.at(block);
        distance_ = input_.inputs;
        a_steps_ = input_.inputs / kNumbers;
        if (a_steps_ < steps_) input_.copy(block, count, a_steps_ * kNumbers, ends_, kNumbers);
        return;
      }
    }
    if (block == copied_) return;
    if (count < kBlock) std::fill_n(rows_, kBlock * distance_, Number(0));
    input_.copy(block, count, 0, rows_, distance_);
    copied_ = block;
  }

  // Multiply the block of rows by a panel of columns, and finish the block before it meanwhile.
  template <bool kBoth>
  void multiply(const char* b) {
    finish_stores();
    clear_tiles();
    const int64_t steps = a_steps_, distance = distance_;
    const Number* a = a_;
    for (int64_t k = 0; k < steps; ++k, a += kNumbers, b += kStepBytes) {
      multiply_tiles<kBoth>(a, distance, b, b + kRows * kTileRow);
      soon_.step();
      finisher_.finish(rows_of_step_);
    }
    if (steps < steps_) multiply_tiles<kBoth>(ends_, kNumbers, b, b + kRows * kTileRow);
    finisher_.finish(kBlock);
    store_tiles<kBoth>(finisher_.memory(), kBlock);
    finish_stores();
  }

  const Layer& layer_;
  const Rows& input_;
  const int64_t steps_, rows_of_step_;  // K in rows of tiles; rows to finish meanwhile
  Arena arena_;
  Number *const rows_, *const ends_;
  Finish finisher_;
  Prefetch soon_;
  // The block of rows: where it is, how far its rows lie apart, and how many of its steps are
  // there.
  const Number* a_ = nullptr;
  int64_t distance_ = 0, a_steps_ = 0, copied_ = -1;
  const Tiles tiles_;
};

template <typename Out, Then kThen, typename Rows>
void run(const Layer& layer, const Rows& input) {
  const int64_t bytes = input.inputs * sizeof(typename Rows::Number);
  const int64_t steps = (bytes + kTileRow - 1) / kTileRow;
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t down =
      Rows::kInMemory
          ? parts_of_rows(layer, kBlock * bytes, steps * kStepBytes, 4 * steps, threads)
          : threads;
  split_blocks(layer, down, threads, [&] { return LinearKernel<Rows, Out, kThen>(layer, input); });
}

// As check_layer; a scale for 8-bit sums; a factor and a zero point where the result is quantized.
template <typename Number>
at::Tensor apply(const at::Tensor& input, const at::Tensor& weight, const float* scale,
                 const at::Tensor& bias, const std::optional<at::Tensor>& other, int64_t outputs,
                 const std::string& then, std::optional<double> out_factor,
                 double out_zero_point) {
  constexpr bool is_int8 = sizeof(Number) == 1;
  const auto sizes = check_layer(input, is_int8 ? at::kByte : at::kBFloat16, weight, 1,
                                 kTileRow / sizeof(Number), bias, other, outputs, then);
  TORCH_CHECK(!out_factor || !other, "a sum or product does not fit a quantized result");
  const at::Tensor x = input.contiguous(), second = other ? other->contiguous() : at::Tensor();
  const auto dtype = then == "add" ? at::kFloat : out_factor ? at::kByte : at::kBFloat16;
  const at::Tensor out = at::empty(sizes, x.options().dtype(dtype));
  const int64_t inputs = x.size(-1);
  const MatrixRows<Number> rows{static_cast<const Number*>(x.const_data_ptr()), inputs};
  const Layer layer{static_cast<const char*>(weight.const_data_ptr()), scale,
                    bias.const_data_ptr<float>(), other ? second.const_data_ptr() : nullptr,
                    out.mutable_data_ptr(), x.numel() / inputs, outputs,
                    static_cast<float>(out_factor.value_or(0)),
                    static_cast<float>(out_zero_point)};
  dispatch(then, [&](auto constant) {
    constexpr Then kThen = decltype(constant)::value;
    if constexpr (kThen == Then::kAdd) {
      run<float, kThen>(layer, rows);
    } else if constexpr (is_int8 && kThen != Then::kMultiply) {
      out_factor ? run<uint8_t, kThen>(layer, rows) : run<bfloat16, kThen>(layer, rows);
    } else {
      run<bfloat16, kThen>(layer, rows);
    }
  });
  return out;
}

at::Tensor linear_amx(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias,
                      const std::optional<at::Tensor>& other, int64_t outputs,
                      const std::string& then) {
  return apply<bfloat16>(x, weight, nullptr, bias, other, outputs, then, std::nullopt, 0);
}

// A result in bfloat16, in float32 from "add", or quantized: times a factor, plus a zero point.
at::Tensor linear_int8_amx(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& scale,
                           const at::Tensor& bias, const std::optional<at::Tensor>& other,
                           int64_t outputs, const std::string& then,
                           std::optional<double> out_factor, double out_zero_point) {
  TORCH_CHECK(scale.scalar_type() == at::kFloat && scale.numel() == bias.numel(), "scales ",
              scale.sizes(), " do not fit a bias ", bias.sizes());
  return apply<uint8_t>(x, weight, scale.const_data_ptr<float>(), bias, other, outputs, then,
                        out_factor, out_zero_point);
}

// Images (B, C, H, W) float32 -> (B, h w, N) float32.
at::Tensor patches_amx(const at::Tensor& images, const at::Tensor& weight, const at::Tensor& bias,
                       int64_t outputs, int64_t down, int64_t across) {
  check_amx();
  const at::Tensor x = images.contiguous();
  TORCH_CHECK(x.dim() == 4 && x.scalar_type() == at::kFloat && bias.scalar_type() == at::kFloat &&
                  down > 0 && across > 0 && outputs > 0,
              "patches are taken of images in float32, not of ", x.scalar_type(), " ", x.sizes());
  const int64_t inputs = 3 * x.size(1) * down * across, columns = round_up(outputs, kBlock);
  TORCH_CHECK(bias.numel() == columns && weight.numel() == columns * round_up(inputs, kStep),
              "weights ", weight.sizes(), " and bias ", bias.sizes(), " do not fit ", x.sizes(),
              " and ", outputs, " outputs");
  const int64_t patches = (x.size(2) / down) * (x.size(3) / across);
  const at::Tensor out = at::empty({x.size(0), patches, outputs}, x.options());
  const PatchRows rows{x.const_data_ptr<float>(), x.size(1), x.size(2), x.size(3), down, across,
                       inputs};
  const Layer layer{static_cast<const char*>(weight.const_data_ptr()), nullptr,
                    bias.const_data_ptr<float>(), nullptr, out.mutable_data_ptr(),
                    x.size(0) * patches, outputs, 0, 0};
  run<float, Then::kNothing>(layer, rows);
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vitlib, library) {
  library.def("patches_amx(Tensor images, Tensor weight, Tensor bias, int outputs, int down, "
              "int across) -> Tensor");
  library.def("linear_amx(Tensor x, Tensor weight, Tensor bias, Tensor? other, int outputs, "
              "str then) -> Tensor");
  library.def("linear_int8_amx(Tensor x, Tensor weight, Tensor scale, Tensor bias, Tensor? other, "
              "int outputs, str then, float? out_factor, float out_zero_point) -> Tensor");
}

TORCH_LIBRARY_IMPL(vitlib, CPU, library) {
  library.impl("patches_amx", patches_amx);
  library.impl("linear_amx", linear_amx);
  library.impl("linear_int8_amx", linear_int8_amx);
}
