package daemon

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/nbd"
	"github.com/droverproject/drover/qcow2"
)

// maxName is how long the name of an export may be, by the protocol.
const maxName = 4096

// snapshots offers the snapshots inside the images.
type snapshots struct{ d *Daemon }

// Offers lists the snapshots there are now. An image whose snapshots cannot be read has none.
func (p snapshots) Offers() []nbd.Offer {
	var list []nbd.Offer
	seen := make(map[string]bool)
	for _, e := range p.exports() {
		im, all := e.snapshots()
		for _, l := range labels(e.Name, all) {
			if !seen[l.name] && !l.byID {
				seen[l.name] = true
				list = append(list, e.offer(im, l))
			}
		}
	}
	return list
}

// Find returns the snapshot that a client means: the one that the list has under this name, or one by its ID.
func (p snapshots) Find(name string) (nbd.Offer, bool) {
	for _, e := range p.exports() {
		if !strings.HasPrefix(name, e.Name+"@") {
			continue
		}
		im, all := e.snapshots()
		for _, l := range labels(e.Name, all) {
			if l.name == name {
				return e.offer(im, l), true
			}
		}
	}
	return nbd.Offer{}, false
}

// exports lists the exports with the longest name first: "a@b@c" is the snapshot "c" of "a@b" rather than "b@c" of "a",
// in the list and for those who ask.
func (p snapshots) exports() []*openExport {
	list := slices.DeleteFunc(p.d.all(), func(e *openExport) bool { return e.HideSnapshots || e.Snapshot != nil })
	slices.SortStableFunc(list, func(a, b *openExport) int { return cmp.Compare(len(b.Name), len(a.Name)) })
	return list
}

// snapshots returns the snapshots of an export's image.
func (e *openExport) snapshots() (*qcow2.Image, []qcow2.Snapshot) {
	im, ok := block.As[*qcow2.Image](e.dev)
	if !ok {
		return nil, nil
	}
	list, err := im.Snapshots()
	if err != nil {
		return nil, nil // whoever asks for one is told that there is none
	}
	return im, list
}

// label is the name under which a snapshot is served.
type label struct {
	name string
	byID bool // it has another name, under which it is listed
	qcow2.Snapshot
}

// labels returns the names of an image's snapshots, each unique. A snapshot goes by its name and, unless that is another's
// name, by its ID as well. If its name cannot be an export's, or is that of an older snapshot, it is listed by its ID.
func labels(export string, list []qcow2.Snapshot) []label {
	taken := make(map[string]bool)
	named := make([]bool, len(list))
	var out []label
	for i, s := range list {
		name := export + "@" + s.Name
		if s.Name != "" && !taken[name] && validName(name) {
			taken[name], named[i] = true, true
			out = append(out, label{name, false, s})
		}
	}
	for i, s := range list {
		name := export + "@" + s.ID
		if s.ID != "" && !taken[name] && validName(name) {
			taken[name] = true
			out = append(out, label{name, named[i], s})
		}
	}
	return out
}

// validName reports whether the protocol can carry a name.
func validName(s string) bool {
	return len(s) <= maxName && utf8.ValidString(s) && !strings.ContainsRune(s, 0)
}

func (e *openExport) offer(im *qcow2.Image, l label) nbd.Offer {
	return nbd.Offer{
		Name: l.name, Allow: e.Allow,
		Description: fmt.Sprintf("snapshot of %s", l.Date.UTC().Format(time.RFC3339)),
		Open: func(ctx context.Context) (block.Device, error) {
			view, err := im.OpenSnapshot(ctx, l.ID)
			if err != nil {
				return nil, err
			}
			return view, nil
		},
	}
}
