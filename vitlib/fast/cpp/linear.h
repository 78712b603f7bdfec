// What the linear layers on AMX's tiles share: what follows a product, and how it is divided.
//
// A block of the result is 32 rows and 32 columns, four tiles of sums.
//
// Shapes: M rows, K inputs, N outputs.

#include <optional>
#include <string>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t kBlock = 32;  // rows, or columns
constexpr int64_t kLine = 64;   // bytes of a cache line
constexpr int64_t kStepBytes = 2 * kRows * kTileRow;  // weights of 32 columns and a row of a tile
constexpr int64_t kCached = 1 << 20;  // bytes, of the 2 MiB of L2 of every CPU with AMX

enum class Then { kNothing, kGelu, kGeluTanh, kSilu, kMultiply, kAdd };

struct Layer {
  const char* weight;
  const float *scale, *bias;  // of 8-bit sums; of N in whole blocks
  const void* other;          // (M, N), of the result's dtype to multiply by, float32 to add
  void* out;
  int64_t rows, outputs;
  float out_factor, out_zero_point;  // of uint8 results
};

// 2 to the power of y, as exact as float32.
inline __m512 exp2_float32(__m512 y) {
  const __m512 whole = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(y, whole);
  __m512 p = _mm512_set1_ps(1.52527336e-05f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.000154035297f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.00133335579f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.00961812865f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.0555041097f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.240226507f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.693147182f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// x / (1 + 2^t)
template <bool kFloat32>
inline __m512 divide_by_one_plus_exp2(__m512 x, __m512 t) {
  const __m512 one = _mm512_set1_ps(1.0f);
  if constexpr (kFloat32) return _mm512_div_ps(x, _mm512_add_ps(one, exp2_float32(t)));
  return _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(one, exp2(t))));
}

// As exact as float32, or as bfloat16 needs.
template <Then kThen, bool kFloat32>
inline __m512 activate(__m512 x) {
  if constexpr (kThen == Then::kSilu)
    return divide_by_one_plus_exp2<kFloat32>(x, _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f)));
  if constexpr (kThen == Then::kGeluTanh) {  // -2 sqrt(2 / pi) (x + 0.044715 x^3), 1606.08415
    const __m512 slope = _mm512_fmadd_ps(
        _mm512_mul_ps(x, x), _mm512_set1_ps(-0.102943240f), _mm512_set1_ps(-2.30220819f));
    return divide_by_one_plus_exp2<kFloat32>(x, _mm512_mul_ps(x, slope));
  }
  if constexpr (kThen == Then::kGelu && kFloat32) {
    // The logit of the normal distribution, over x, by a polynomial of x^2 up to 5.5^2. The result
    // errs by 7e-8.
    const __m512 s = _mm512_min_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(30.25f));
    __m512 slope = _mm512_set1_ps(-5.20991739e-09f);
    slope = _mm512_fmadd_ps(slope, s, _mm512_set1_ps(3.85045382e-07f));
    slope = _mm512_fmadd_ps(slope, s, _mm512_set1_ps(-1.14524364e-05f));
    slope = _mm512_fmadd_ps(slope, s, _mm512_set1_ps(0.00015938947f));
    slope = _mm512_fmadd_ps(slope, s, _mm512_set1_ps(9.55927244e-05f));
    slope = _mm512_fmadd_ps(slope, s, _mm512_set1_ps(-0.10483858f));
    slope = _mm512_fmadd_ps(slope, s, _mm512_set1_ps(-2.30220723f));
    return divide_by_one_plus_exp2<true>(x, _mm512_mul_ps(x, slope));
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

// What follows the products of a block: it is computed while the next block is multiplied.
//
// kInt8: sums are whole numbers. Out: float, bfloat16 or uint8_t.
template <bool kInt8, typename Out, Then kThen>
class Finisher {
 public:
  static constexpr int64_t kBytes = 2 * kBlock * kBlock * sizeof(float);

  Finisher(const Layer& layer, Arena& arena)
      : layer_(layer),
        sums_{arena.take<float>(kBlock * kBlock), arena.take<float>(kBlock * kBlock)} {}

  // Return where the sums of the next block belong, in rows of 32.
  float* memory() { return sums_[next_]; }

  // Begin to finish a block, whose sums are in memory().
  void start(int64_t row, int64_t column, int64_t count) {
    sums_of_block_ = sums_[next_];
    next_ ^= 1;
    done_ = 0;
    count_ = count;
    offset_ = row * kBlock * layer_.outputs + column * kBlock;
    lanes_ = first_lanes(layer_.outputs - column * kBlock);
    for (int half = 0; half < 2; ++half) {
      const int64_t at = column * kBlock + half * kLanes;
      bias_[half] = _mm512_loadu_ps(layer_.bias + at);
      if (kInt8) scale_[half] = _mm512_loadu_ps(layer_.scale + at);
    }
  }

  // Finish some rows of the block that was begun.
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
      const __m512 y =
          finish_half(sums + i * kBlock + kLanes, scale[1], bias[1], right, at + kLanes);
      write(x, y, left, right, out + at);
    }
    done_ = end;
  }

 private:
  __m512 finish_half(const float* sums, __m512 scale, __m512 bias, __mmask16 lanes,
                     int64_t at) const {
    __m512 x;
    if constexpr (kInt8) {
      x = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums)), scale, bias);
    } else {
      x = _mm512_add_ps(_mm512_load_ps(sums), bias);
    }
    x = activate<kThen, std::is_same_v<Out, float>>(x);
    if constexpr (kThen == Then::kMultiply) {
      x = _mm512_mul_ps(x, load_factor(static_cast<const Out*>(layer_.other) + at, lanes));
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

  static __m512 load_factor(const float* from, __mmask16 lanes) {
    return _mm512_maskz_loadu_ps(lanes, from);
  }

  static __m512 load_factor(const bfloat16* from, __mmask16 lanes) {
    return widen(_mm256_maskz_loadu_epi16(lanes, from));
  }

  __m128i quantize(__m512 x) const {
    const __m512 factor = _mm512_set1_ps(layer_.out_factor);
    const __m512 zero_point = _mm512_set1_ps(layer_.out_zero_point);
    const __m512i whole = _mm512_cvtps_epi32(_mm512_fmadd_ps(x, factor, zero_point));
    return _mm512_cvtusepi32_epi8(_mm512_max_epi32(whole, _mm512_setzero_si512()));
  }

  const Layer& layer_;
  float* const sums_[2];
  // The block: its sums, its rows that are done and that there are, where it begins in the result,
  // and its columns.
  const float* sums_of_block_ = nullptr;
  int64_t done_ = 0, count_ = 0, offset_ = 0;
  uint32_t lanes_ = 0;
  __m512 bias_[2], scale_[2];
  int next_ = 0;
};

// Weights that are brought into the cache before they are multiplied.
class Prefetch {
 public:
  // Take the bytes from `begin` to `end` in about so many steps.
  void start(const char* begin, const char* end, int64_t steps) {
    next_ = begin;
    end_ = end;
    bytes_ = round_up((end - begin + steps - 1) / steps, kLine);
  }

  void step() {
    const char* const end = std::min(end_, next_ + bytes_);
    for (; next_ < end; next_ += kLine) _mm_prefetch(next_, _MM_HINT_T1);
  }

 private:
  const char *next_ = nullptr, *end_ = nullptr;
  int64_t bytes_ = 0;
};

// Return into how many parts the rows are divided, of `threads` parts of rows and columns.
//
// Each part multiplies its blocks, and reads its weights; where columns are divided as well, it
// reads inputs that another thread wrote. The costs of a byte, over that of a product of two tiles,
// were measured on an Intel Xeon with AMX.
int64_t parts_of_rows(const Layer& layer, int64_t inputs_of_block, int64_t weights_of_block,
                      int64_t products_of_block, int64_t threads) {
  const auto part = [](int64_t all, int64_t parts) {
    const int64_t blocks = (all + kBlock - 1) / kBlock;
    return (blocks + parts - 1) / parts;
  };
  const auto cost = [&](int64_t down) {
    const int64_t across = threads / down;
    const int64_t tall = part(layer.rows, down), wide = part(layer.outputs, across);
    const int64_t foreign = across > 1 ? tall * inputs_of_block : 0;
    // A byte takes 1/30 ns, a foreign one 1/10, a product of tiles 7.
    return 210 * tall * wide * products_of_block + wide * weights_of_block + 3 * foreign;
  };
  int64_t best = threads;
  for (int64_t down = threads - 1; down > 0; --down)
    if (threads % down == 0 && cost(down) < cost(best)) best = down;
  return best;
}

// Run kernels on parts of the blocks, of which `down` are parts of the rows. make() returns the
// kernel of a thread.
template <typename Make>
void split_blocks(const Layer& layer, int64_t down, int64_t threads, const Make& make) {
  const int64_t rows = (layer.rows + kBlock - 1) / kBlock;
  const int64_t columns = (layer.outputs + kBlock - 1) / kBlock, across = threads / down;
  split_among_threads(threads, [&](int64_t begin, int64_t end) {
    auto kernel = make();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / across, j = task % across;
      kernel.run(rows * i / down, rows * (i + 1) / down, columns * j / across,
                 columns * (j + 1) / across);
    }
  });
}

void check_amx() {
  static const bool has_amx = at::cpu::init_amx();
  TORCH_CHECK(has_amx, "this process may not use AMX");
}

// Check what a linear layer is called with, and return the sizes of its result, (..., N).
//
// x (..., K) of a dtype; weights of `parts` numbers for each input, in rows of tiles of `numbers`;
// a bias of N in whole blocks; another tensor (..., N) to multiply by or to add, or none.
std::vector<int64_t> check_layer(const at::Tensor& x, at::ScalarType dtype,
                                 const at::Tensor& weight, int64_t parts, int64_t numbers,
                                 const at::Tensor& bias, const std::optional<at::Tensor>& other,
                                 int64_t outputs, const std::string& then) {
  check_amx();
  TORCH_CHECK(x.scalar_type() == dtype && x.dim() > 0 && bias.scalar_type() == at::kFloat &&
                  outputs > 0,
              "a linear layer of ", dtype, " takes no ", x.scalar_type(), " and bias of ",
              bias.scalar_type());
  auto sizes = x.sizes().vec();
  const int64_t inputs = sizes.back(), columns = round_up(outputs, kBlock);
  TORCH_CHECK(inputs > 0 && bias.numel() == columns &&
                  weight.numel() == parts * columns * round_up(inputs, numbers),
              "weights ", weight.sizes(), " and bias ", bias.sizes(), " do not fit ", x.sizes(),
              " and ", outputs, " outputs");
  sizes.back() = outputs;
  const bool adds = then == "add";
  const auto other_dtype = adds || dtype == at::kFloat ? at::kFloat : at::kBFloat16;
  TORCH_CHECK((adds || then == "mul") == other.has_value() &&
                  (!other || (other->sizes() == at::IntArrayRef(sizes) &&
                              other->scalar_type() == other_dtype)),
              "the other tensor does not fit ", then);
  return sizes;
}

// Call f with what follows a product, as a constant.
template <typename F>
void dispatch(const std::string& then, const F& f) {
  if (then == "none") return f(std::integral_constant<Then, Then::kNothing>());
  if (then == "gelu") return f(std::integral_constant<Then, Then::kGelu>());
  if (then == "gelu_tanh") return f(std::integral_constant<Then, Then::kGeluTanh>());
  if (then == "silu") return f(std::integral_constant<Then, Then::kSilu>());
  if (then == "mul") return f(std::integral_constant<Then, Then::kMultiply>());
  if (then == "add") return f(std::integral_constant<Then, Then::kAdd>());
  TORCH_CHECK(false, "a linear layer is not followed by ", then);
}

}  // namespace
