package block

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"strconv"
	"strings"
)

var (
	// ErrSizeSyntax is wrapped for a text that is not a size.
	ErrSizeSyntax = errors.New("not a size")
	// ErrSizeRange is wrapped for a size that does not fit.
	ErrSizeRange = errors.New("size is out of range")
)

// ParseSize reads a number of bytes as QEMU's tools do: decimal or 0x hexadecimal, with an optional suffix b, k, M, G,
// T, P or E (powers of 1024, in either case). A decimal number with a suffix may have a fraction.
func ParseSize(text string) (int64, error) {
	if strings.HasPrefix(text, "0x") || strings.HasPrefix(text, "0X") {
		return parseHex(text) // no suffix: b and e are digits
	}
	mul, num := sizeSuffix(text)
	whole, frac, hasFrac := strings.Cut(num, ".")
	if whole == "" || !isDigits(whole) || hasFrac && !isDigits(frac) {
		return 0, fmt.Errorf("%q is %w", text, ErrSizeSyntax)
	}
	n, err := strconv.ParseUint(whole, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%q: %w", text, ErrSizeRange)
	}
	var part uint64
	if f := fraction(frac); f > 0 {
		if mul == 1 {
			return 0, fmt.Errorf("%q is %w: there are no fractions of bytes", text, ErrSizeSyntax)
		}
		part = uint64(f*float64(mul) + 0.5)
	}
	hi, lo := bits.Mul64(n, mul)
	sum, carry := bits.Add64(lo, part, 0)
	if hi != 0 || carry != 0 || sum > math.MaxInt64 {
		return 0, fmt.Errorf("%q: %w", text, ErrSizeRange)
	}
	return int64(sum), nil
}

// sizeSuffix takes the suffix off a size and returns what it multiplies by.
func sizeSuffix(text string) (mul uint64, num string) {
	if text == "" {
		return 1, ""
	}
	last := len(text) - 1
	i := strings.IndexByte("bkmgtpe", text[last]|0x20)
	if i < 0 {
		return 1, text
	}
	return 1 << (10 * i), text[:last]
}

func isDigits(s string) bool { return strings.Trim(s, "0123456789") == "" }

func fraction(digits string) float64 {
	if digits == "" {
		return 0
	}
	f, err := strconv.ParseFloat("0."+digits, 64)
	if err != nil {
		return 0
	}
	return f
}

func parseHex(text string) (int64, error) {
	n, err := strconv.ParseUint(text[2:], 16, 64)
	switch {
	case errors.Is(err, strconv.ErrRange) || err == nil && n > math.MaxInt64:
		return 0, fmt.Errorf("%q: %w", text, ErrSizeRange)
	case err != nil:
		return 0, fmt.Errorf("%q is %w", text, ErrSizeSyntax)
	}
	return int64(n), nil
}
