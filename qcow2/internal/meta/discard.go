package meta

// Cause is why clusters lost a reference. It decides whether the host gets their space back when the last one goes.
type Cause uint8

// The causes. What they mean to the host is a PassDiscard's to say, but for the first two.
const (
	CauseNever    Cause = iota // the space is kept for the next allocation
	CauseAlways                // the part of the file is gone for good: truncation, repair
	CauseRequest               // the guest discarded, or zeroed and allowed the space to go
	CauseSnapshot              // an internal snapshot was deleted
	CauseOther                 // what copy-on-write and moved tables leave behind
)

// PassDiscard says for which causes the space of clusters that become free is given back to the host.
type PassDiscard struct{ Request, Snapshot, Other bool }

// Passes reports whether clusters freed by a cause are punched out of the file.
func (p PassDiscard) Passes(c Cause) bool {
	switch c {
	case CauseAlways:
		return true
	case CauseRequest:
		return p.Request
	case CauseSnapshot:
		return p.Snapshot
	case CauseOther:
		return p.Other
	}
	return false
}
