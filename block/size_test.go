package block_test

import (
	"errors"
	"math"
	"testing"

	"github.com/droverproject/drover/block"
)

func TestParseSize(t *testing.T) {
	for text, want := range map[string]int64{
		"0": 0, "1": 1, "512": 512, "1b": 1, "1B": 1, "1k": 1024, "1K": 1024, "64k": 65536, "2M": 2 << 20, "1m": 1 << 20,
		"1G": 1 << 30, "3T": 3 << 40, "2P": 2 << 50, "7E": 7 << 60, "1.5G": 3 << 29, "1.7k": 1741, "0.5k": 512, "1.0": 1,
		"1.k": 1024, "0x1000": 4096, "0X1f": 31, "0x1e": 30, "9223372036854775807": math.MaxInt64,
		"007": 7,
	} {
		if got, err := block.ParseSize(text); err != nil || got != want {
			t.Errorf("ParseSize(%q) = %d, %v; want %d", text, got, err, want)
		}
	}
	for text, want := range map[string]error{
		"": block.ErrSizeSyntax, "k": block.ErrSizeSyntax, "-1": block.ErrSizeSyntax, "+1": block.ErrSizeSyntax,
		" 1": block.ErrSizeSyntax, "1X": block.ErrSizeSyntax, "1kk": block.ErrSizeSyntax, "1.5": block.ErrSizeSyntax,
		"1.5b": block.ErrSizeSyntax, "1e3": block.ErrSizeSyntax, "0x": block.ErrSizeSyntax, "0x1k": block.ErrSizeSyntax,
		"0x1.8": block.ErrSizeSyntax, "inf": block.ErrSizeSyntax, ".5k": block.ErrSizeSyntax, "1_0": block.ErrSizeSyntax,
		"8E": block.ErrSizeRange, "9223372036854775808": block.ErrSizeRange, "0xffffffffffffffff": block.ErrSizeRange,
		"99999999999999999999": block.ErrSizeRange, "7.99999999999999999E": block.ErrSizeRange,
	} {
		if got, err := block.ParseSize(text); !errors.Is(err, want) {
			t.Errorf("ParseSize(%q) = %d, %v; want %v", text, got, err, want)
		}
	}
}
