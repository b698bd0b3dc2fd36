package daemon

import "time"

// What the control API says and takes, as JSON. Names are those of QEMU where it has some.

// ServerStatus describes the server.
type ServerStatus struct {
	Kind     string    `json:"kind"` // "serve" or "tcmu"
	Version  string    `json:"version"`
	PID      int       `json:"pid"`
	Started  time.Time `json:"started"`
	LogLevel string    `json:"log-level,omitempty"`
	Disks    int       `json:"disks"`
	Clients  int       `json:"clients"`
	// CacheBytes is what the metadata caches of all images take, CacheLimit what they may.
	CacheBytes int64    `json:"cache-bytes"`
	CacheLimit int64    `json:"cache-limit"`
	URIs       []string `json:"uris,omitempty"`
}

// States of a disk.
const (
	StateServing = "serving"
	StateFailed  = "failed" // it could not be opened; DiskStatus.Error says why
)

// DiskStatus describes an export of serve, or a device of tcmu.
type DiskStatus struct {
	Name     string `json:"name"`
	State    string `json:"state"`
	Error    string `json:"error,omitempty"`
	Config   string `json:"config,omitempty"` // the configuration string of a device
	HBA      string `json:"hba,omitempty"`    // the target's adapter that the device belongs to: user_N
	Image    string `json:"image"`
	Format   string `json:"format,omitempty"`
	Snapshot string `json:"snapshot,omitempty"` // the one that is served in place of the disk
	Size     int64  `json:"size"`
	ReadOnly bool   `json:"read-only"`
	// Operation is what somebody does to the image as a whole right now: until it is done, the numbers below that need the
	// image are missing.
	Operation string `json:"operation,omitempty"`

	Clients       int     `json:"clients"`
	IO            IOStats `json:"io"`
	SnapshotCount int     `json:"snapshot-count"`
	BitmapCount   int     `json:"bitmap-count"`

	CacheBytes        int64 `json:"cache-bytes"`
	ClusterCacheBytes int64 `json:"cluster-cache-bytes"`
	// Unflushed: there are changes that a power cut could take back. Dirty: the image would be repaired when it is opened next if
	// the server ended now without a word. Corrupt is why the image takes no changes any more.
	Unflushed bool   `json:"unflushed"`
	Dirty     bool   `json:"dirty"`
	Corrupt   string `json:"corrupt,omitempty"`
}

// IOStats counts requests, of a disk since the server has it, or of a client.
type IOStats struct {
	Inflight     int    `json:"in-flight"`
	Requests     uint64 `json:"requests"` // of every kind
	Reads        uint64 `json:"reads"`
	Writes       uint64 `json:"writes"`
	Flushes      uint64 `json:"flushes"`
	Discards     uint64 `json:"discards"` // requests that give space back or zero
	BytesRead    uint64 `json:"bytes-read"`
	BytesWritten uint64 `json:"bytes-written"`
	Errors       uint64 `json:"errors"` // requests that the image failed
}

// DiskDetails is all that is known of a disk.
type DiskDetails struct {
	DiskStatus
	URIs        []string         `json:"uris,omitempty"`
	Description string           `json:"description,omitempty"`
	Connections []ClientStatus   `json:"connections"`
	Snapshots   []SnapshotStatus `json:"snapshots"`
	Bitmaps     []BitmapStatus   `json:"bitmaps"`
}

// ClientStatus describes a connection.
type ClientStatus struct {
	ID    uint64    `json:"id"`
	Peer  string    `json:"peer"`
	Since time.Time `json:"since"`
	// Export is what the client has chosen: the disk, or one of its snapshots.
	Export string  `json:"export"`
	Size   int64   `json:"size"` // of the disk, as the client was told
	IO     IOStats `json:"io"`
}

// SnapshotStatus describes a snapshot inside an image.
type SnapshotStatus struct {
	ID          string    `json:"id"`
	Name        string    `json:"name"`
	Date        time.Time `json:"date"`
	DiskSize    int64     `json:"disk-size"`
	VMStateSize uint64    `json:"vm-state-size"`
}

// BitmapStatus describes a dirty bitmap.
type BitmapStatus struct {
	Name        string `json:"name"`
	Granularity int64  `json:"granularity"`
	Enabled     bool   `json:"enabled"`
	// Inconsistent: its last user did not store it. It can only be removed.
	Inconsistent bool `json:"inconsistent"`
	Served       bool `json:"served"` // clients can read it
}

// NameRequest carries a name: that of a new snapshot, or the new name of one.
type NameRequest struct {
	Name string `json:"name"`
}

// ResizeRequest is a disk's new size.
type ResizeRequest struct {
	Size          int64  `json:"size"`
	Shrink        bool   `json:"shrink,omitempty"`
	Preallocation string `json:"preallocation,omitempty"`
}

// ResizeReply is what became of it.
type ResizeReply struct {
	OldSize int64 `json:"old-size"`
	Size    int64 `json:"size"`
	// Note says what has to be done for everybody to notice.
	Note string `json:"note,omitempty"`
}

// BitmapRequest describes a new dirty bitmap.
type BitmapRequest struct {
	Name        string `json:"name"`
	Granularity int64  `json:"granularity,omitempty"`
	Disabled    bool   `json:"disabled,omitempty"`
}

// BitmapAction is what to do to a bitmap: clear, enable, disable, or merge with Source.
type BitmapAction struct {
	Action string `json:"action"`
	Source string `json:"source,omitempty"`
}

// CheckReply is what a check of a live image has found.
type CheckReply struct {
	CheckErrors    int64    `json:"check-errors"`
	Corruptions    int64    `json:"corruptions"`
	Leaks          int64    `json:"leaks"`
	ImageEndOffset int64    `json:"image-end-offset"`
	Total          int64    `json:"total-clusters"`
	Allocated      int64    `json:"allocated-clusters"`
	Fragmented     int64    `json:"fragmented-clusters"`
	Compressed     int64    `json:"compressed-clusters"`
	Findings       []string `json:"findings"`
	Dropped        int64    `json:"findings-left-out,omitempty"`
}

// ExportRequest is an export to be added.
type ExportRequest struct {
	Name        string `json:"name"`
	Description string `json:"description,omitempty"`
	Image       string `json:"image"`
	Format      string `json:"format,omitempty"`
	ReadOnly    bool   `json:"read-only,omitempty"`
	Snapshot    string `json:"snapshot,omitempty"`
	// HideSnapshots keeps the snapshots inside the image from being served.
	HideSnapshots bool              `json:"hide-snapshots,omitempty"`
	Bitmaps       []string          `json:"bitmaps,omitempty"`
	Options       map[string]string `json:"options,omitempty"`
	// Allow has rules like "uid:1000" that stand in place of the server's general ones.
	Allow []string `json:"allow,omitempty"`
}

// ReloadReply says what a reload has changed.
type ReloadReply struct {
	Changes []string `json:"changes"`
}

// LogLevel is how much is logged: error, warn, info or debug.
type LogLevel struct {
	Level string `json:"level"`
}

// ErrorReply is the body of every answer but a success.
type ErrorReply struct {
	Error string `json:"error"`
}
