package block

import (
	"fmt"
	"strings"
)

// Repair says what was mended in an image that was not closed cleanly, when it was opened for writing.
type Repair struct {
	Errors, Leaks int64 // mended
	ErrorsLeft    int64 // that could not be
	LeaksLeft     int64
	Notes         []string // whole sentences that a user should know of
}

// String returns one sentence for the user, to follow the name of the image and a colon.
func (r Repair) String() string {
	var did []string
	for _, part := range []struct {
		n    int64
		what string
	}{{r.Errors, "repaired %d errors"}, {r.Leaks, "freed %d leaked clusters"}, {r.ErrorsLeft, "%d errors are left"}, {r.LeaksLeft, "%d leaked clusters are left"}} {
		if part.n > 0 {
			did = append(did, fmt.Sprintf(part.what, part.n))
		}
	}
	if did == nil {
		did = []string{"nothing was wrong with it"}
	}
	text := "the image was not closed cleanly and has been checked: " + strings.Join(did, ", ")
	for _, n := range r.Notes {
		text += "; " + strings.TrimSuffix(n, ".")
	}
	return text
}
