package qemuio

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/droverproject/drover/block"
)

// maxRequest is the longest request that is not split: the largest number of whole sectors that a C int counts.
const maxRequest = 1<<31 - 512

// sectorSize is the unit of what is aligned.
const sectorSize = 512

// number reads an offset or a length, and tells what is wrong with it.
func (s *Shell) number(text string) (int64, bool) {
	n, err := block.ParseSize(unsigned(text))
	switch {
	case err == nil:
		return n, true
	case errors.Is(err, block.ErrSizeRange):
		s.printf("Parsing error: argument too large -- %s\n", text)
	default:
		s.printf("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- %s\n", text)
	}
	return 0, false
}

// pattern reads the byte that a buffer is filled with: a number as C writes it.
func (s *Shell) pattern(text string) (byte, bool) {
	// ParseUint takes 0b, 0o and _ as well, which are not C's.
	n, err := strconv.ParseUint(unsigned(text), 0, 16)
	if err != nil || n > 255 || strings.ContainsAny(text, "_oO") || len(text) > 1 && (text[1] == 'b' || text[1] == 'B') {
		s.printf("%s is not a valid pattern byte\n", text)
		return 0, false
	}
	return byte(n), true
}

// unsigned drops a plus sign before a number, as C does.
func unsigned(text string) string {
	if rest, ok := strings.CutPrefix(text, "+"); ok && rest != "" && '0' <= rest[0] && rest[0] <= '9' {
		return rest
	}
	return text
}

// aligned reports whether n is a whole number of sectors, and tells when not.
func (s *Shell) aligned(what string, n int64) bool {
	if n%sectorSize == 0 {
		return true
	}
	s.printf("%d is not a sector-aligned value for '%s'\n", n, what)
	return false
}

// size writes a number of bytes for people: three decimals, unless they are all zero, and a binary unit.
func size(n float64) string {
	units := [...]string{"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	if n < 1024 {
		return trimZeroes(fmt.Sprintf("%f", n)) + " bytes"
	}
	i := -1
	for n >= 1024 && i < len(units)-1 {
		n /= 1024
		i++
	}
	return trimZeroes(fmt.Sprintf("%.3f", n)) + " " + units[i]
}

// trimZeroes drops a fraction of nothing.
func trimZeroes(text string) string {
	whole, fraction, _ := strings.Cut(text, ".")
	if strings.Trim(fraction, "0") == "" {
		return whole
	}
	return text
}

// elapsed writes a duration: hours, minutes and seconds when asked for or when it is a second or more.
func elapsed(d time.Duration, fixed bool) string {
	hundredths := d.Microseconds() / 10000 % 100
	seconds := int64(d.Seconds())
	if fixed || seconds > 0 {
		return fmt.Sprintf("%d:%02d:%02d.%02d", seconds/3600, seconds/60%60, seconds%60, hundredths)
	}
	return fmt.Sprintf("%02d.%02d sec", seconds, hundredths)
}

// report tells of a request that has ended well: verb says what it did, off where, count how many bytes of how many.
func (s *Shell) report(verb string, d time.Duration, off, count, total int64, machine bool) {
	seconds := max(d.Seconds(), 1e-9)
	if machine {
		// bytes,ops,time,bytes/sec,ops/sec
		s.printf("%d,%d,%s,%.3f,%.3f\n", total, 1, elapsed(d, true), float64(total)/seconds, 1/seconds)
		return
	}
	s.printf("%s %d/%d bytes at offset %d\n", verb, total, count, off)
	s.printf("%s, %d ops; %s (%s/sec and %.4f ops/sec)\n",
		size(float64(total)), 1, elapsed(d, false), size(float64(total)/seconds), 1/seconds)
}

// dump prints bytes in hexadecimal and as characters, sixteen a line.
func (s *Shell) dump(p []byte, off int64) {
	var b strings.Builder
	for i := 0; i < len(p); i += 16 {
		line := p[i:min(i+16, len(p))]
		fmt.Fprintf(&b, "%08x:  ", off+int64(i))
		for _, c := range line {
			fmt.Fprintf(&b, "%02x ", c)
		}
		b.WriteByte(' ')
		for _, c := range line {
			if !alphanumeric(c) {
				c = '.'
			}
			b.WriteByte(c)
		}
		b.WriteByte('\n')
	}
	s.printf("%s", b.String())
}

func alphanumeric(c byte) bool {
	return '0' <= c && c <= '9' || 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z'
}
