// Behind machine.hpp, in place of overlap.cuh: copies of boxes swizzle, and what the kernel before
// writes may be late.

struct alignas(64) TensorMap {
    u64 words[16];  // address, three sides, two strides in bytes, three sides of a box
};

inline void let_next_start() { mine().let_next = true; }
// A GPU starts the next kernel at the end of one that does not, which is late.
inline bool all_let_next_start() {
    return std::all_of(programs.begin(), programs.end(), [](const Block& b) { return b.let_next; });
}
inline void await_last() {
    wait_until([] { return preceded; });
}
inline void meet_programs(u32* count, u32 programs) {
    count_up(count);
    wait_until([&] { return *count >= programs; });
    if (count_up(count) == 2 * programs - 1) *count = 0;
}
inline float4 read_fresh(const float* from) {
    pause(), ++moved;
    return {from[0], from[1], from[2], from[3]};
}
inline u64 leaving_first() { return 0; }
inline void fence_barriers() {}
inline void fence_shared_copies() {}

inline u32 swizzled(u32 address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy_cube(u32 to, const TensorMap& map, int x, int y, int z, u32 barrier) {
    to = far_address(to), barrier = far_address(barrier);
    const u64* m = map.words;
    enqueue([=] {
        for (u32 k = 0, at = 0; k < m[8]; ++k)
            for (u32 j = 0; j < m[7]; ++j)
                for (u32 i = 0; i < m[6]; ++i, at += 2) {
                    const bool inside = x + i < m[1] && y + j < m[2] && z + k < m[3];
                    const char* from = reinterpret_cast<const char*>(m[0]) + (x + i) * 2 +
                                       (y + j) * m[4] + (z + k) * m[5];
                    const u16 zero = 0;
                    std::memcpy(place(swizzled(to + at)),
                                inside ? from : reinterpret_cast<const char*>(&zero), 2);
                }
        arrive_bytes(barrier, m[6] * m[7] * m[8] * 2);
    });
}
inline void copy_box(u32 to, const TensorMap& map, int inner, int row, u32 barrier, u64) {
    copy_cube(to, map, inner, row, 0, barrier);
}
inline void copy_chunks(u32 to, const TensorMap& map, int row, int chunk, u32 barrier) {
    copy_cube(to, map, 0, row, chunk, barrier);
}
