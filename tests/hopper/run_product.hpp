// Behind linear.cu: its threads, and what the test calls.

static const Arguments* given;

static void thread_main() {
    cluster_linear(*given);
    running->done = true, ++moved;
}

extern "C" int arguments_bytes() { return sizeof(Arguments); }

// Run the whole grid; 0, or 1 if a cluster hung or kept the next kernel waiting.
extern "C" int run(const Arguments* arguments, int programs_wide, int rows_high, int seed,
                   const Late* late, int n_late) {
    given = arguments;
    chance.seed(seed);
    preceded = false;
    for (int row = 0; row < rows_high; ++row)
        for (int first = 0; first < programs_wide; first += SPLIT)
            if (!run_together(first, row, SPLIT, WARPS * 32 + 64, late, n_late) ||
                !all_let_next_start())
                return 1;
    return 0;
}
