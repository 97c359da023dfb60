// Behind attend.cu: its threads, and what the test calls.

static const Arguments* given;

static void thread_main() {
    balanced_attention(*given);
    running->done = true, ++moved;
}

extern "C" int arguments_bytes() { return sizeof(Arguments); }

// Run all programs together; 0, or 1 if they hung.
extern "C" int run(const Arguments* arguments, int programs_wide, int seed, const Late* late,
                   int n_late) {
    given = arguments;
    chance.seed(seed);
    preceded = false;
    return !run_together(0, 0, programs_wide, WARPS * 32 + 96, late, n_late);
}
