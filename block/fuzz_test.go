package block_test

import (
	"errors"
	"math/big"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/droverproject/drover/block"
)

// sizeUnits are the suffixes of sizes, each 1024 times the one before.
const sizeUnits = "bkmgtpe"

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{
		"", "0", "1", "512", "1k", "1.5G", "0.5e", "7.99999999999999999E", "8E", "9223372036854775807", "9223372036854775808",
		"18446744073709551616", "0x10", "0X7fffffffffffffff", "0xffffffffffffffff", "0x", "0x1k", ".5k", "5.", "5.k", "1e3", "-1", "+1",
		" 1", "1 ", "1kk", "1,5k", "1.5", "1_000", "٣", "0.0000000000000000000000000000001T", "1\x00k", "infE", "nanE", "0b1",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		n, err := block.ParseSize(text)
		syntax, tooBig := errors.Is(err, block.ErrSizeSyntax), errors.Is(err, block.ErrSizeRange)
		if err != nil {
			if n != 0 || syntax == tooBig {
				t.Fatalf("%q: %d, %v: not a single reason", text, n, err)
			}
			return
		}
		if n < 0 {
			t.Fatalf("%q is %d", text, n)
		}
		if again, err := block.ParseSize(strconv.FormatInt(n, 10)); err != nil || again != n {
			t.Errorf("%q is %d, and that is %d (%v)", text, n, again, err)
		}
		if again, err := block.ParseSize(strings.ToUpper(text)); err != nil || again != n {
			t.Errorf("%q is %d, and %d (%v) in capital letters", text, n, again, err)
		}
		if want, tolerance, ok := exactSize(text); ok {
			diff := new(big.Rat).Sub(new(big.Rat).SetInt64(n), want)
			if diff.Abs(diff).Cmp(tolerance) > 0 {
				t.Errorf("%q is %d, want %s", text, n, want.FloatString(3))
			}
		}
	})
}

// exactSize computes a decimal size without rounding, and how far a result may be off: half a byte, and what a
// fraction's last bit is worth, since fractions are computed in floating point (as QEMU does).
func exactSize(text string) (size, tolerance *big.Rat, ok bool) {
	mul := int64(1)
	tolerance = big.NewRat(1, 2)
	if i := strings.IndexByte(sizeUnits, strings.ToLower(text + " ")[len(text)-1]); text != "" && i >= 0 && !isHex(text) {
		mul, text = 1<<(10*i), text[:len(text)-1]
	}
	if isHex(text) {
		n, ok := new(big.Int).SetString(text[2:], 16)
		if !ok {
			return nil, nil, false
		}
		return new(big.Rat).SetInt(n), tolerance, true
	}
	if len(text) > 100 {
		return nil, nil, false // exact, and slow
	}
	size, ok = new(big.Rat).SetString(text)
	if !ok {
		return nil, nil, false
	}
	lastBit := big.NewRat(mul, 1<<52)
	return size.Mul(size, new(big.Rat).SetInt64(mul)), tolerance.Add(tolerance, lastBit), true
}

func isHex(text string) bool { return len(text) > 2 && strings.ToLower(text[:2]) == "0x" }

// FuzzNameSyntax: what names mean, without looking at files.
func FuzzNameSyntax(f *testing.F) {
	for _, name := range hostileNames {
		f.Add("dir/image", name)
		f.Add("image", name)
	}
	f.Add("", "x")
	f.Add("/", "x")
	f.Fuzz(func(t *testing.T, image, name string) {
		protocol, rest, isPlain := block.SplitProtocol(name)
		switch {
		case isPlain && protocol != "" || !isPlain && protocol == "" && !strings.HasPrefix(name, ":"):
			t.Errorf("SplitProtocol(%q) = %q, %q, %v", name, protocol, rest, isPlain)
		case isPlain && rest != name && "file:"+rest != name:
			t.Errorf("SplitProtocol(%q) = %q, %q loses something", name, protocol, rest)
		case protocol != "" && (protocol+":"+rest != name || strings.ContainsAny(protocol, ":/") || protocol == "file"):
			t.Errorf("SplitProtocol(%q) = %q, %q", name, protocol, rest)
		}
		plain, err := block.PlainName(name)
		if usable := isPlain && rest != "" && len(rest) <= 4096; usable != (err == nil) || err == nil && plain != rest {
			t.Errorf("PlainName(%q) = %q, %v; its file is %q and its protocol %q", name, plain, err, rest, protocol)
		}
		if err == nil {
			if again, err := block.PlainName("file:" + plain); err != nil && len(plain) <= 4096 || again != plain {
				t.Errorf("PlainName(%q) = %q, and with file: it is %q, %v", name, plain, again, err)
			}
		}
		path := block.ResolveName(image, name)
		dir := image[:strings.LastIndexByte(filepath.ToSlash(image), '/')+1]
		if want := dir + name; path != want && !(filepath.IsAbs(name) && path == name) {
			t.Errorf("ResolveName(%q, %q) = %q", image, name, path)
		}
	})
}

// hostileNames are names that an image may store. $OUT stands for the absolute path of a folder that must not be reached,
// $IN for that of the image's own.
var hostileNames = []string{
	"base", "sub/base", "./sub/../base", "inside", "$IN/base", "file:base", "file:$IN/base",
	"", ".", "..", "/", "//", "\x00", "a\x00b", "file:", ":", "::", strings.Repeat("x", 5000), strings.Repeat("../", 1400) + "x",
	"../canary", "sub/../../canary", "./../canary", "..//canary", ".../canary", "sub/./../.././canary", "$OUT/canary", "/$OUT/canary",
	"$IN/../canary", "file:$OUT/canary", "file:../canary", "file://$OUT/canary", "FILE:$OUT/canary", "file:file:../canary",
	"escape", "escapedir/canary", "escapedir/../canary", "up/canary", "sub/up/up/canary", "chain", "self", "dangling",
	"/proc/self/root$OUT/canary", "/proc/self/cwd/canary", "proc/root$OUT/canary", "fds/0", "fds/3", "/dev/fd/0", "/dev/stdin",
	"/proc/self/fd/0", "/proc/self/mem", "/dev/zero", "/dev/tty", "zero", "fifo", "sub/fifo", "sub", "locked/x",
	"json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"$OUT/canary\"}}", "json:{}", "json:", "JSON:{}",
	"json:{\"file.filename\":\"$OUT/canary\"}", "nbd:unix:$OUT/socket", "nbd+unix:///?socket=$OUT/socket", "nbd://localhost/x",
	"https://localhost/x", "ssh://localhost$OUT/canary", "fat:$OUT", "host_device:/dev/zero", "blkdebug::$OUT/canary",
	"C:\\x", "\\\\host\\share\\x", "~/x", "$HOME/x", "*", "-", "/dev/fdset/1", "fd:3",
	"\xff\xfe", "base\n", "base/", "base/.", "base/../base", "escape/", "café",
}
