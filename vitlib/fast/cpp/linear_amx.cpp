// Linear layers of bfloat16, and of uint8 inputs and int8 weights, by the tiles of AMX.
//
// How data flows: a block of the result is 32 rows and 32 columns, four tiles of sums, to which the
// products of all inputs are added. Then the sums are written to a small memory, and while the next
// block is multiplied, what follows the product is computed of them: the bias, an activation, a
// product or a sum with another tensor. A thread takes some rows and some columns; weights that
// exceed a part of the L2 cache are taken in parts, each for all rows.
//
// Weights are packed: for 32 columns and 64 bytes of inputs two tiles of 16 columns, in which each
// row holds 2 (or 4) inputs of each column. What is missing to whole blocks is zero.
//
// Shapes: M rows, K inputs, N outputs.

#include <string>

namespace {

constexpr int64_t kBlock = 32;  // rows, or columns
constexpr int64_t kLine = 64;    // bytes of a cache line
constexpr int64_t kStepBytes = 2 * kRows * kTileRow;  // weights of 32 columns and a row of a tile
constexpr int64_t kCached = 1 << 20;  // bytes, of the 2 MiB of L2 of every CPU with AMX

enum class Then { kNothing, kGelu, kGeluTanh, kSilu, kMultiply, kAdd };

struct Layer {
  const char* weight;
  const float *scale, *bias;  // of 8-bit sums; of N in whole blocks
  const void* other;          // (M, N), bfloat16 to multiply by, float32 to add
  void* out;
  int64_t rows, outputs;
  float out_factor, out_zero_point;  // of uint8 results
};

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
// the first ones of a patch, the second ones, and the first ones again: by weights that are split as
// well, and without the product of both second ones, the result is nearly that of float32.
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

// x / (1 + 2^t)
inline __m512 divide_by_one_plus_exp2(__m512 x, __m512 t) {
  return _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1.0f), exp2(t))));
}

template <Then kThen>
inline __m512 activate(__m512 x) {
  if constexpr (kThen == Then::kSilu) {
    return divide_by_one_plus_exp2(x, _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
  }
  if constexpr (kThen == Then::kGeluTanh) {  // -2 sqrt(2 / pi) (x + 0.044715 x^3), 1606.08415
    const __m512 square = _mm512_mul_ps(x, x);
    const __m512 slope = _mm512_fmadd_ps(square, _mm512_set1_ps(-0.102943240f),
                                         _mm512_set1_ps(-2.30220819f));
    return divide_by_one_plus_exp2(x, _mm512_mul_ps(x, slope));
  }
  if constexpr (kThen == Then::kGelu) {
    // The normal distribution less a half, over x, by a polynomial of x^2 that is 1 / 8 at x = 4,
    // so that the distribution is 0 or 1 from there. The result errs by at most 2e-4.
    const __m512 end = _mm512_set1_ps(4.0f);
    const __m512 c = _mm512_max_ps(_mm512_min_ps(x, end), _mm512_sub_ps(_mm512_setzero_ps(), end));
    const __m512 s = _mm512_mul_ps(c, c);
    __m512 p = _mm512_set1_ps(2.25891323e-08f);
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(-1.58887542e-06f));
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(4.77648646e-05f));
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(-0.000812197162f));
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(0.00876373891f));
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(-0.06455452f));
    p = _mm512_fmadd_ps(p, s, _mm512_set1_ps(0.397870421f));
    return _mm512_mul_ps(x, _mm512_fmadd_ps(p, c, _mm512_set1_ps(0.5f)));
  }
  return x;
}

// Rows: of bfloat16 or uint8_t, as above. Out: float, bfloat16 or uint8_t.
template <typename Rows, typename Out, Then kThen>
class LinearKernel {
  using Number = typename Rows::Number;

 public:
  LinearKernel(const Layer& layer, const Rows& input)
      : layer_(layer), input_(input), steps_((input.inputs + kNumbers - 1) / kNumbers),
        rows_of_step_((kBlock + steps_ - 1) / steps_),
        arena_(kBlock * (steps_ + 1) * kTileRow + 2 * kBlock * kBlock * sizeof(float)),
        rows_(arena_.take<Number>(kBlock * steps_ * kNumbers)),
        ends_(arena_.take<Number>(kBlock * kNumbers)),
        sums_{arena_.take<float>(kBlock * kBlock), arena_.take<float>(kBlock * kBlock)} {
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
    lines_of_step_ = (kStepBytes / kLine + last_row - row - 1) / (last_row - row);
    for (int64_t first = column; first < last_column; first += part) {
      const int64_t last = std::min(last_column, first + part);
      soon_ = layer_.weight + last * panel;
      soon_end_ = layer_.weight + std::min(last_column, last + part) * panel;
      for (int64_t i = row; i < last_row; ++i) {
        const int64_t count = std::min(kBlock, layer_.rows - i * kBlock);
        find_rows(i, count);
        for (int64_t j = first; j < last; ++j) {
          if (count > kRows) {
            multiply<true>(layer_.weight + j * panel);
          } else {
            multiply<false>(layer_.weight + j * panel);
          }
          start_finishing(i, j, count);
        }
      }
    }
    finish(kBlock);
  }

 private:
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
      fetch_weights();
      finish(rows_of_step_);
    }
    if (steps < steps_) multiply_tiles<kBoth>(ends_, kNumbers, b, b + kRows * kTileRow);
    finish(kBlock);
    store_tiles<kBoth>(sums_[next_], kBlock);
    finish_stores();
  }

  // Bring some of the weights of the next part into the cache.
  void fetch_weights() {
    const char* const end = std::min(soon_end_, soon_ + lines_of_step_ * kLine);
    for (; soon_ < end; soon_ += kLine) _mm_prefetch(soon_, _MM_HINT_T1);
  }

  void start_finishing(int64_t row, int64_t column, int64_t count) {
    sums_of_block_ = sums_[next_];
    next_ ^= 1;
    done_ = 0;
    count_ = count;
    offset_ = row * kBlock * layer_.outputs + column * kBlock;
    lanes_ = first_lanes(layer_.outputs - column * kBlock);
    for (int half = 0; half < 2; ++half) {
      const int64_t at = column * kBlock + half * kLanes;
      bias_[half] = _mm512_loadu_ps(layer_.bias + at);
      if (sizeof(Number) == 1) scale_[half] = _mm512_loadu_ps(layer_.scale + at);
    }
  }

  // Finish some rows of the block before.
  void finish(int64_t count) {
    const int64_t end = std::min(count_, done_ + count);
    // Copies, which a store may not change.
    const float* const sums = sums_of_block_;
    const int64_t outputs = layer_.outputs, first = offset_;
    const __mmask16 left = lanes_, right = lanes_ >> kLanes;
    const __m512 bias[] = {bias_[0], bias_[1]}, scale[] = {scale_[0], scale_[1]};
    Out* const out = static_cast<Out*>(layer_.out);
    for (int64_t i = done_; i < end; ++i) {
      const int64_t at = first + i * outputs;
      const __m512 x = finish_half(sums + i * kBlock, scale[0], bias[0], left, at);
      const __m512 y = finish_half(sums + i * kBlock + kLanes, scale[1], bias[1], right, at + kLanes);
      write(x, y, left, right, out + at);
    }
    done_ = end;
  }

  __m512 finish_half(const float* sums, __m512 scale, __m512 bias, __mmask16 lanes,
                     int64_t at) const {
    __m512 x;
    if constexpr (sizeof(Number) == 1) {
      x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums)), scale, bias);
    } else {
      x = _mm512_add_ps(_mm512_load_ps(sums), bias);
    }
    x = activate<kThen>(x);
    if constexpr (kThen == Then::kMultiply) {
      const auto* const other = static_cast<const bfloat16*>(layer_.other) + at;
      x = _mm512_mul_ps(x, widen(_mm256_maskz_loadu_epi16(lanes, other)));
    }
    if constexpr (kThen == Then::kAdd) {
      const auto* const other = static_cast<const float*>(layer_.other) + at;
      x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(lanes, other));
    }
    return x;
  }

  void write(__m512 x, __m512 y, __mmask16 left, __mmask16 right, Out* out) const {
    if constexpr (std::is_same_v<Out, float>) {
      _mm512_mask_storeu_ps(out, left, x);
      _mm512_mask_storeu_ps(out + kLanes, right, y);
    } else if constexpr (std::is_same_v<Out, bfloat16>) {
      _mm512_mask_storeu_epi16(out, _mm512_kunpackw(right, left), round_to_bfloat16(x, y));
    } else {
      _mm_mask_storeu_epi8(out, left, quantize(x));
      _mm_mask_storeu_epi8(out + kLanes, right, quantize(y));
    }
  }

  __m128i quantize(__m512 x) const {
    const __m512 factor = _mm512_set1_ps(layer_.out_factor);
    const __m512 zero_point = _mm512_set1_ps(layer_.out_zero_point);
    const __m512i whole = _mm512_cvtps_epi32(_mm512_fmadd_ps(x, factor, zero_point));
    return _mm512_cvtusepi32_epi8(_mm512_max_epi32(whole, _mm512_setzero_si512()));
  }

  const Layer& layer_;
  const Rows& input_;
  const int64_t steps_, rows_of_step_;  // K in rows of tiles; rows to finish meanwhile
  Arena arena_;
  Number *const rows_, *const ends_;
  float* const sums_[2];
  // The block of rows: where it is, how far its rows lie apart, and how many of its steps are there.
  const Number* a_ = nullptr;
  int64_t distance_ = 0, a_steps_ = 0, copied_ = -1;
  // The block that is being finished: its sums, its rows that are done and that there are, where
  // it begins in the result, and its columns.
  const float* sums_of_block_ = nullptr;
  int64_t done_ = 0, count_ = 0, offset_ = 0;
  uint32_t lanes_ = 0;
  const char *soon_ = nullptr, *soon_end_ = nullptr;
  int64_t lines_of_step_ = 0;
  __m512 bias_[2], scale_[2];
  int next_ = 0;
  const Tiles tiles_;
};

// Return into how many parts the rows are divided, of `threads` parts of rows and columns.
//
// Each part multiplies its blocks, and reads its weights; where columns are divided as well, it
// reads inputs that another thread wrote. The costs of a byte, over that of a product of two tiles,
// were measured on a Xeon of the fourth generation.
int64_t parts_of_rows(int64_t rows, int64_t columns, int64_t steps, int64_t threads) {
  const auto cost = [&](int64_t down) {
    const int64_t across = threads / down;
    const int64_t tall = (rows + down - 1) / down, wide = (columns + across - 1) / across;
    const int64_t products = 4 * tall * wide * steps;
    const int64_t weights = wide * steps * kStepBytes;
    const int64_t foreign = across > 1 ? tall * kBlock * steps * kTileRow : 0;
    return 210 * products + weights + 3 * foreign;  // a byte takes 1/30 ns, a product 7
  };
  int64_t best = threads;
  for (int64_t down = threads - 1; down > 0; --down)
    if (threads % down == 0 && cost(down) < cost(best)) best = down;
  return best;
}

template <typename Out, Then kThen, typename Rows>
void run(const Layer& layer, const Rows& input) {
  const int64_t rows = (layer.rows + kBlock - 1) / kBlock;
  const int64_t columns = (layer.outputs + kBlock - 1) / kBlock;
  const int64_t bytes = input.inputs * sizeof(typename Rows::Number);
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t steps = (bytes + kTileRow - 1) / kTileRow;
  const int64_t down = Rows::kInMemory ? parts_of_rows(rows, columns, steps, threads) : threads;
  const int64_t across = threads / down;
  split_among_threads(threads, [&](int64_t begin, int64_t end) {
    LinearKernel<Rows, Out, kThen> kernel(layer, input);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / across, j = task % across;
      kernel.run(rows * i / down, rows * (i + 1) / down, columns * j / across,
                 columns * (j + 1) / across);
    }
  });
}

template <typename Out, typename Rows>
void run(const Layer& layer, const Rows& input, const std::string& then) {
  if (then == "none") return run<Out, Then::kNothing>(layer, input);
  if (then == "gelu") return run<Out, Then::kGelu>(layer, input);
  if (then == "gelu_tanh") return run<Out, Then::kGeluTanh>(layer, input);
  if (then == "silu") return run<Out, Then::kSilu>(layer, input);
  if (then == "mul" && sizeof(Out) == 2) return run<Out, Then::kMultiply>(layer, input);
  TORCH_CHECK(false, "a linear layer of this kind is not followed by ", then);
}

void check_amx() {
  static const bool has_amx = at::cpu::init_amx();
  TORCH_CHECK(has_amx, "this process may not use AMX");
}

// x (..., K), packed weights, a bias of N in whole blocks; another tensor (..., N) or none.
template <typename Number>
at::Tensor apply(const at::Tensor& input, const at::Tensor& weight, const float* scale,
                 const at::Tensor& bias, const std::optional<at::Tensor>& other, int64_t outputs,
                 const std::string& then, std::optional<double> out_factor,
                 double out_zero_point) {
  constexpr bool is_int8 = sizeof(Number) == 1;
  constexpr int64_t numbers = kTileRow / sizeof(Number);
  check_amx();
  const at::Tensor x = input.contiguous();
  TORCH_CHECK(x.scalar_type() == (is_int8 ? at::kByte : at::kBFloat16) && x.dim() > 0 &&
                  bias.scalar_type() == at::kFloat && outputs > 0,
              "a linear layer takes no ", x.scalar_type(), " and bias of ", bias.scalar_type());
  auto sizes = x.sizes().vec();
  const int64_t inputs = sizes.back(), columns = round_up(outputs, kBlock);
  TORCH_CHECK(inputs > 0 && bias.numel() == columns &&
                  weight.numel() == columns * round_up(inputs, numbers),
              "weights ", weight.sizes(), " and bias ", bias.sizes(), " do not fit ", x.sizes(),
              " and ", outputs, " outputs");
  sizes.back() = outputs;
  const bool adds = then == "add", multiplies = then == "mul";
  const at::Tensor second = other ? other->contiguous() : at::Tensor();
  TORCH_CHECK((adds || multiplies) == other.has_value() &&
                  (!other || (second.sizes() == at::IntArrayRef(sizes) &&
                              second.scalar_type() == (adds ? at::kFloat : at::kBFloat16))),
              "the other tensor does not fit ", then);
  const at::ScalarType dtype = adds ? at::kFloat : out_factor ? at::kByte : at::kBFloat16;
  const at::Tensor out = at::empty(sizes, x.options().dtype(dtype));
  const MatrixRows<Number> rows{static_cast<const Number*>(x.const_data_ptr()), inputs};
  const Layer layer{static_cast<const char*>(weight.const_data_ptr()), scale,
                    bias.const_data_ptr<float>(), other ? second.const_data_ptr() : nullptr,
                    out.mutable_data_ptr(), x.numel() / inputs, outputs,
                    static_cast<float>(out_factor.value_or(0)),
                    static_cast<float>(out_zero_point)};
  if (adds) {
    run<float, Then::kAdd>(layer, rows);
  } else if (!out_factor) {
    run<bfloat16>(layer, rows, then);
  } else if constexpr (is_int8) {
    run<uint8_t>(layer, rows, then);
  }
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
