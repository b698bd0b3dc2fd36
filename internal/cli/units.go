package cli

import (
	"errors"
	"fmt"
	"math"

	"github.com/droverproject/drover/block"
)

// humanSize formats a number of bytes with three digits and a binary unit, as qemu-img does: "1.5 GiB".
func humanSize(n uint64) string {
	units := [...]string{"", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"}
	// From 1000 on a number is shown in the next unit (as 0.977), so that there are never more than three digits.
	_, exp := math.Frexp(float64(n) / (1000.0 / 1024.0))
	i := max(exp-1, 0) / 10
	return fmt.Sprintf("%.3g %sB", float64(n)/float64(uint64(1)<<(10*i)), units[i])
}

// parseSize reads a size that the user gave for what.
func parseSize(what, text string) (int64, error) {
	n, err := block.ParseSize(text)
	switch {
	case err == nil:
		return n, nil
	case errors.Is(err, block.ErrSizeRange):
		return 0, errorf("Invalid %s specified. Must be between 0 and %d.", what, int64(math.MaxInt64))
	}
	return 0, thenf(errorf("Invalid %s specified. You may use k, M, G, T, P or E suffixes for", what),
		"kilobytes, megabytes, gigabytes, terabytes, petabytes and exabytes.")
}
