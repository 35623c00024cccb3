// SPDX-License-Identifier: MIT
#include <array>
#include <map>
#include <string>

#include "emulator/host.h"
#include "emulator/selftest/selftest.h"

using namespace pk::emulator;

PK_EMULATOR_MODULE(module) {
  module.def("places", [](const Array& out, std::array<int, 3> grid, std::array<int, 3> block) {
    const Output<int> result(out, "out");
    check(launch_places(result.data(), grid[0], grid[1], grid[2], block[0], block[1], block[2], nullptr));
  });
  module.def("transpose", [](const Array& in, const Array& out, std::array<float, 4> scale) {
    const Input<float> source(in, "in");
    const Output<float> target(out, "out");
    check(launch_transpose(source.data(), target.data(), static_cast<int>(source.shape(0)), static_cast<int>(source.shape(1)), scale.data(),
                           nullptr));
  });
  module.def("block_sums", [](const Array& in, const Array& out, int blocks, int threads) {
    const Input<float> source(in, "in");
    const Output<float> target(out, "out");
    check(launch_block_sums(source.data(), target.data(), blocks, threads, nullptr));
  });
  module.def("block_votes", [](const Array& in, const Array& out) {
    const Input<int> source(in, "in");
    const Output<int> target(out, "out");
    check(launch_block_votes(source.data(), target.data(), static_cast<int>(source.size()), nullptr));
  });
  module.def("shuffles", [](const Array& in, const Array& out, const Array& in_int, const Array& out_int, int argument, int width) {
    const Input<double> source(in, "in");
    const Output<double> target(out, "out");
    const Input<int> source_int(in_int, "in_int");
    const Output<int> target_int(out_int, "out_int");
    check(launch_shuffles(source.data(), target.data(), source_int.data(), target_int.data(), argument, width, nullptr));
  });
  module.def("votes", [](const Array& in, const Array& out, unsigned mask) {
    const Input<int> source(in, "in");
    const Output<unsigned> target(out, "out");
    check(launch_votes(source.data(), target.data(), mask, nullptr));
  });
  module.def("atomics", [](const Array& in, const Array& counts, const Array& sum_float, const Array& sum_double, const Array& extremes,
                           const Array& compare_swap_sum, const Array& tickets) {
    const Input<int> source(in, "in");
    const Output<int> count(counts, "counts");
    const Output<float> single(sum_float, "sum_float");
    const Output<double> twice(sum_double, "sum_double");
    const Output<int> extreme(extremes, "extremes");
    const Output<unsigned> swapped(compare_swap_sum, "compare_swap_sum");
    const Output<unsigned> ticket(tickets, "tickets");
    check(launch_atomics(source.data(), static_cast<int>(source.size()), static_cast<int>(count.size()), count.data(), single.data(),
                         twice.data(), extreme.data(), swapped.data(), ticket.data(), nullptr));
  });
  module.def("pipeline", [](const Array& in, const Array& out, int width) {
    const Input<float> source(in, "in");
    const Output<float> target(out, "out");
    check(launch_pipeline(source.data(), target.data(), static_cast<int>(source.shape(0)), static_cast<int>(source.shape(1)), width,
                          nullptr));
  });
  module.def("mma", [](const Array& a, const Array& b, const Array& out, int kind) {
    const Input<float> left(a, "a");
    const Input<float> right(b, "b");
    const Output<float> product(out, "out");
    check(launch_mma(left.data(), right.data(), product.data(), static_cast<int>(left.shape(1)), static_cast<MmaKind>(kind), nullptr));
  });
  module.def("rounding", [](const Array& in, const Array& tf32, const Array& bf16, const Array& half, const Array& back) {
    const Input<float> source(in, "in");
    const Output<unsigned> tf32_bits(tf32, "tf32");
    const Output<std::uint16_t> bf16_bits(bf16, "bf16");
    const Output<__half> half_bits(half, "half");
    const Output<float> floats(back, "back");
    check(launch_rounding(source.data(), tf32_bits.data(), bf16_bits.data(), reinterpret_cast<std::uint16_t*>(half_bits.data()),
                          floats.data(), static_cast<int>(source.size()), nullptr));
  });
  module.def("powers", [](const Array& in, const Array& out) {
    const Input<float> source(in, "in");
    const Output<float> target(out, "out");
    check(launch_powers(source.data(), target.data(), static_cast<int>(source.size()), nullptr));
  });
  module.def("vector_copy", [](const Array& in, const Array& out) {
    const Input<float> source(in, "in");
    const Output<float> target(out, "out");
    check(launch_vector_copy(source.data(), target.data(), static_cast<int>(source.size()), nullptr));
  });
  module.def("last_block_sum", [](const Array& in, const Array& partial, const Array& counter, const Array& out) {
    const Input<float> source(in, "in");
    const Output<float> partials(partial, "partial");
    const Output<unsigned> count(counter, "counter");
    const Output<float> target(out, "out");
    check(launch_last_block_sum(source.data(), partials.data(), count.data(), target.data(), static_cast<int>(source.shape(0)), nullptr));
  });
  module.def("warp_exchange", [](const Array& in, const Array& out) {
    const Input<float> source(in, "in");
    const Output<float> target(out, "out");
    check(launch_warp_exchange(source.data(), target.data(), static_cast<int>(source.size()), nullptr));
  });
  module.def("half_rotate", [](const Array& in, const Array& out) {
    const Input<float> source(in, "in");
    const Output<float> target(out, "out");
    check(launch_half_rotate(source.data(), target.data(), static_cast<int>(source.size()), nullptr));
  });
  module.def("workload", [](const Array& in, const Array& out, int blocks, int threads, int rounds) {
    const Input<float> source(in, "in");
    const Output<float> target(out, "out");
    check(launch_workload(source.data(), target.data(), blocks, threads, rounds, nullptr));
  });
  module.def("probe", [](const Array& out, std::array<int, 2> grid, std::array<int, 2> block, std::size_t dynamic_shared_bytes) {
    const Output<int> target(out, "out");
    check(launch_probe(target.data(), grid[0], grid[1], block[0], block[1], dynamic_shared_bytes, nullptr));
  });
  module.def("broken", [](const std::string& name, const Array& in, const Array& out) {
    static const std::map<std::string, Mistake> mistakes{
        {"missing_barrier", Mistake::missing_barrier},
        {"read_before_write", Mistake::read_before_write},
        {"unwritten_output", Mistake::unwritten_output},
        {"global_out_of_bounds", Mistake::global_out_of_bounds},
        {"global_write_out_of_bounds", Mistake::global_write_out_of_bounds},
        {"shared_out_of_bounds", Mistake::shared_out_of_bounds},
        {"divergent_barrier", Mistake::divergent_barrier},
        {"return_before_barrier", Mistake::return_before_barrier},
        {"divergent_shuffle", Mistake::divergent_shuffle},
        {"foreign_mask", Mistake::foreign_mask},
        {"copy_not_waited", Mistake::copy_not_waited},
        {"copy_without_barrier", Mistake::copy_without_barrier},
        {"write_after_read", Mistake::write_after_read},
        {"write_write", Mistake::write_write},
        {"missing_warp_barrier", Mistake::missing_warp_barrier},
        {"misaligned_vector", Mistake::misaligned_vector},
        {"misaligned_cast", Mistake::misaligned_cast},
        {"misaligned_copy", Mistake::misaligned_copy},
        {"unordered_blocks", Mistake::unordered_blocks},
        {"unpublished_block", Mistake::unpublished_block},
        {"modified_input", Mistake::modified_input},
        {"spin_on_memory", Mistake::spin_on_memory},
        {"spin_on_an_atomic", Mistake::spin_on_an_atomic},
        {"grid_barrier", Mistake::grid_barrier},
        {"endless_loop", Mistake::endless_loop},
        {"endless_barriers", Mistake::endless_barriers},
        {"trap", Mistake::trap},
    };
    const Input<float> source(in, "in");
    const Output<float> target(out, "out");
    // The kernel that writes to its input needs the pointer without const, as a careless caller would give it.
    check(launch_broken(mistakes.at(name), const_cast<float*>(source.data()), target.data(), static_cast<int>(target.size()), nullptr));
  });
}
