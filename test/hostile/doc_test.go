// Package hostile damages images on purpose, each in one way, and says for each what stock QEMU 7.2 makes of it and what
// drover makes of it.
//
// The two tables (headers_test.go, tables_test.go) are meant to be read: a name, the damage, and the outcome of four
// actions. What stock does is written down there and compared with a live run; drover must do the same, or be stricter
// for the reason that stands in the same line. No damage may crash drover, nor cost it more memory or time than a sound
// image of a few megabytes does.
package hostile

import (
	"testing"

	"github.com/droverproject/drover/test/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }
