// Linear layers of float32 by the tiles of AMX: each number is a sum of three in bfloat16.
//
// A float32 number has 24 bits, and bfloat16 8: the first part rounds a number, the second what is
// left, the third the rest of that. Of the nine products of two numbers the six largest are added,
// in float32, the small ones first; those that are left out are 2^-24 of the product, as its
// rounding is.
//
// How data flows: a thread takes some rows and some columns. It splits as many rows, and as many of
// their inputs, as a part of the L2 cache holds, and multiplies them by all of its columns; the
// sums of some inputs wait in memory for those of the next. What follows is computed of a block
// while the next one is multiplied (linear.h).
//
// Weights are packed: for 32 columns and 32 inputs two tiles of the first parts, two of the second
// and two of the third. What is missing to whole blocks is zero.
//
// Shapes: M rows, K inputs, N outputs.

namespace {

constexpr int64_t kParts = 3;   // of a number
constexpr int64_t kSteps = 24;  // rows of tiles whose sums are not stored in between
constexpr int64_t kBlockRow = kBlock * kStep;  // numbers of 32 rows and one row of a tile

template <Then kThen>
class SplitKernel {
 public:
  SplitKernel(const Layer& layer, const float* x, int64_t inputs)
      : layer_(layer), x_(x), inputs_(inputs), steps_((inputs + kStep - 1) / kStep),
        most_steps_(std::min(steps_, kSteps)),
        group_(std::max<int64_t>(1, kCached / (2 * kParts * kBlockRow * most_steps_))),
        waits_(steps_ > kSteps ? group_ * ((layer.outputs + kBlock - 1) / kBlock) : 0),
        arena_(2 * kParts * kBlockRow * most_steps_ * group_ + 4 * kBlock * kBlock * waits_ +
               Finish::kBytes),
        rows_(arena_.take<bfloat16>(kParts * kBlockRow * most_steps_ * group_)),
        waiting_(arena_.take<float>(kBlock * kBlock * waits_)), finisher_(layer, arena_) {}

  // Compute blocks of rows and of columns, from the first to before the last.
  void run(int64_t row, int64_t last_row, int64_t column, int64_t last_column) {
    for (int64_t i = row; i < last_row; i += group_)
      for (int64_t k = 0; k < steps_; k += most_steps_)
        multiply_group(i, std::min(last_row, i + group_), k, std::min(steps_, k + most_steps_),
                       column, last_column);
    finisher_.finish(kBlock);
  }

 private:
  using Finish = Finisher<false, float, kThen>;

  // Multiply some rows, and some of their inputs, by all columns.
  void multiply_group(int64_t row, int64_t last_row, int64_t step, int64_t last_step,
                      int64_t column, int64_t last_column) {
    const int64_t steps = last_step - step, panel = steps_ * kParts * kStepBytes;
    for (int64_t i = row; i < last_row; ++i) split_rows(i, step, steps, rows_at(i - row, steps));
    for (int64_t j = column; j < last_column; ++j) {
      const char* const weight = layer_.weight + j * panel + step * kParts * kStepBytes;
      const int64_t bytes = j + 1 < last_column ? steps * kParts * kStepBytes : 0;
      soon_.start(weight + panel, weight + panel + bytes, (last_row - row) * steps);
      for (int64_t i = row; i < last_row; ++i) {
        const int64_t count = std::min(kBlock, layer_.rows - i * kBlock);
        float* const wait = waiting_ + ((j - column) * group_ + i - row) * kBlock * kBlock;
        const float* const begin = step > 0 ? wait : nullptr;
        float* const end = last_step < steps_ ? wait : nullptr;
        if (count > kRows) {
          multiply<true>(rows_at(i - row, steps), steps, weight, begin, end);
        } else {
          multiply<false>(rows_at(i - row, steps), steps, weight, begin, end);
        }
        if (end == nullptr) finisher_.start(i, j, count);
      }
    }
  }

  bfloat16* rows_at(int64_t block, int64_t steps) const {
    return rows_ + block * kParts * kBlockRow * steps;
  }

  // Split a block of rows: for each step 32 rows of the first parts, of the second and of the
  // third.
  void split_rows(int64_t block, int64_t step, int64_t steps, bfloat16* to) const {
    for (int64_t i = 0; i < kBlock; ++i) {
      const int64_t row = block * kBlock + i;
      const bool exists = row < layer_.rows;
      const float* const from = x_ + (exists ? row : 0) * inputs_;
      for (int64_t k = 0; k < steps; ++k)
        split(from, (step + k) * kStep, exists, to + k * kParts * kBlockRow + i * kStep);
    }
  }

  // Split 32 numbers.
  void split(const float* row, int64_t first, bool exists, bfloat16* to) const {
    const uint32_t lanes = exists ? first_lanes(inputs_ - first) : 0;
    __m512 x = _mm512_maskz_loadu_ps(lanes, row + first);
    __m512 y = _mm512_maskz_loadu_ps(lanes >> kLanes, row + first + kLanes);
    for (int64_t part = 0; part < kParts; ++part, to += kBlockRow) {
      const __m512i both = round_to_bfloat16(x, y);
      _mm512_store_si512(to, both);
      x = _mm512_sub_ps(x, widen(_mm512_castsi512_si256(both)));
      y = _mm512_sub_ps(y, widen(_mm512_extracti64x4_epi64(both, 1)));
    }
  }

  // Multiply a block of rows by a panel of columns, after sums that wait or from zero; the sums go
  // to those that wait, or are to be finished. The block before is finished meanwhile.
  template <bool kBoth>
  void multiply(const bfloat16* a, int64_t steps, const char* b, const float* begin, float* end) {
    const int64_t rows_of_step = (kBlock + steps - 1) / steps;
    finish_stores();
    if (begin == nullptr) {
      clear_tiles();
    } else {
      load_tiles<kBoth>(begin, kBlock);
    }
    for (int64_t k = 0; k < steps; ++k, a += kParts * kBlockRow, b += kParts * kStepBytes) {
      multiply_parts<kBoth>(a, b);
      soon_.step();
      finisher_.finish(rows_of_step);
    }
    if (end == nullptr) {
      finisher_.finish(kBlock);
      end = finisher_.memory();
    }
    store_tiles<kBoth>(end, kBlock);
    finish_stores();
  }

  // Add the six products of a step. A tile stays for as many as follow each other.
  template <bool kBoth>
  static void multiply_parts(const bfloat16* a, const char* b) {
    load_rows<kBoth>(a);
    load_columns(b + 2 * kStepBytes);
    add_products<kBoth>();  // first x third
    load_columns(b + kStepBytes);
    add_products<kBoth>();  // first x second
    load_rows<kBoth>(a + kBlockRow);
    add_products<kBoth>();  // second x second
    load_columns(b);
    add_products<kBoth>();  // second x first
    load_rows<kBoth>(a + 2 * kBlockRow);
    add_products<kBoth>();  // third x first
    load_rows<kBoth>(a);
    add_products<kBoth>();  // first x first
  }

  template <bool kBoth>
  static void load_rows(const bfloat16* a) {
    _tile_loadd(4, a, kTileRow);
    if constexpr (kBoth) _tile_loadd(5, a + kTile, kTileRow);
  }

  static void load_columns(const char* b) {
    _tile_loadd(6, b, kTileRow);
    _tile_loadd(7, b + kStepBytes / 2, kTileRow);
  }

  template <bool kBoth>
  static void add_products() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kBoth) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }

  const Layer& layer_;
  const float* const x_;
  const int64_t inputs_, steps_, most_steps_;  // K, in rows of tiles, and at a time
  const int64_t group_, waits_;                // blocks of rows at a time, and of sums that wait
  Arena arena_;
  bfloat16* const rows_;
  float* const waiting_;
  Finish finisher_;
  Prefetch soon_;
  const Tiles tiles_;
};

template <Then kThen>
void run(const Layer& layer, const float* x, int64_t inputs) {
  const int64_t steps = (inputs + kStep - 1) / kStep;
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t down = parts_of_rows(layer, kBlock * inputs * sizeof(float),
                                     kParts * steps * kStepBytes, 24 * steps, threads);
  split_blocks(layer, down, threads, [&] { return SplitKernel<kThen>(layer, x, inputs); });
}

at::Tensor linear_split_amx(const at::Tensor& input, const at::Tensor& weight,
                            const at::Tensor& bias, const std::optional<at::Tensor>& other,
                            int64_t outputs, const std::string& then) {
  const auto sizes =
      check_layer(input, at::kFloat, weight, kParts, kStep, bias, other, outputs, then);
  const at::Tensor x = input.contiguous(), second = other ? other->contiguous() : at::Tensor();
  const at::Tensor out = at::empty(sizes, x.options());
  const int64_t inputs = x.size(-1);
  const Layer layer{static_cast<const char*>(weight.const_data_ptr()), nullptr,
                    bias.const_data_ptr<float>(), other ? second.const_data_ptr() : nullptr,
                    out.mutable_data_ptr(), x.numel() / inputs, outputs, 0, 0};
  dispatch(then, [&](auto constant) {
    run<decltype(constant)::value>(layer, x.const_data_ptr<float>(), inputs);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(vitlib, library) {
  library.def("linear_split_amx(Tensor x, Tensor weight, Tensor bias, Tensor? other, int outputs, "
              "str then) -> Tensor");
}

TORCH_LIBRARY_IMPL(vitlib, CPU, library) { library.impl("linear_split_amx", linear_split_amx); }
