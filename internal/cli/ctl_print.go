package cli

import (
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/droverproject/drover/daemon"
	"github.com/droverproject/drover/qcow2"
)

// table prints rows under a heading, in columns as wide as they need to be.
func (c *controller) table(heading string, rows func(row func(cells ...string))) {
	w := tabwriter.NewWriter(c.out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, strings.ReplaceAll(heading, " ", "\t"))
	rows(func(cells ...string) { fmt.Fprintln(w, strings.Join(cells, "\t")) })
	_ = w.Flush() // as with every other output, whoever does not read it does not want it
}

// nameOf shows a name that may be empty or have anything in it.
func nameOf(s string) string {
	if s == "" {
		return `""`
	}
	return printable(s)
}

// printable shows what has control characters in it quoted: names come from images and from clients.
func printable(s string) string {
	q := fmt.Sprintf("%q", s)
	if q == `"`+s+`"` {
		return s
	}
	return q
}

func mode(readOnly bool) string {
	if readOnly {
		return "read-only"
	}
	return "read-write"
}

func size(n int64) string { return humanSize(uint64(n)) }

func count[T ~int | ~uint64](n T) string { return fmt.Sprint(n) }

func (c *controller) printList(list []daemon.DiskStatus) {
	if len(list) == 0 {
		c.printf("No disks.\n")
		return
	}
	c.table("NAME STATE MODE SIZE FORMAT CLIENTS SNAPSHOTS BITMAPS IMAGE", func(row func(...string)) {
		for _, d := range list {
			state := d.State
			switch {
			case d.Operation != "":
				state = d.Operation
			case d.Corrupt != "":
				state = "corrupt"
			}
			row(nameOf(d.Name), state, mode(d.ReadOnly), size(d.Size), d.Format, count(d.Clients), count(d.SnapshotCount),
				count(d.BitmapCount), printable(d.Image))
		}
	})
	for _, d := range list {
		if d.Error != "" {
			c.printf("%s: %s\n", nameOf(d.Name), oneLine(d.Error))
		}
	}
}

// field prints one line of show, unless there is nothing to say.
func (c *controller) field(name, value string) {
	if value != "" {
		c.printf("%-14s %s\n", name+":", value)
	}
}

func yes(b bool, text string) string {
	if b {
		return text
	}
	return ""
}

func (c *controller) printDetails(d *daemon.DiskDetails) {
	c.field("name", nameOf(d.Name))
	c.field("state", d.State)
	c.field("error", oneLine(d.Error))
	c.field("operation", yes(d.Operation != "", d.Operation+" is under way"))
	c.field("corrupt", oneLine(d.Corrupt))
	c.field("device", yes(d.HBA != "", d.HBA+"/"+d.Name))
	c.field("config", printable(d.Config))
	c.field("image", printable(d.Image))
	c.field("snapshot", printable(d.Snapshot))
	c.field("format", d.Format)
	c.field("size", fmt.Sprintf("%s (%d bytes)", size(d.Size), d.Size))
	c.field("mode", mode(d.ReadOnly))
	for _, uri := range d.URIs {
		c.field("uri", uri)
	}
	c.field("changes", yes(d.Unflushed, "some wait for a flush"))
	c.field("dirty", yes(d.Dirty, "yes: the image would be repaired after a crash"))
	c.field("cache", fmt.Sprintf("%s of metadata, %s of decompressed clusters", size(d.CacheBytes), size(d.ClusterCacheBytes)))
	c.field("requests", fmt.Sprintf("%d (%d reads, %d writes, %d flushes, %d discards), %d in flight, %d failed", d.IO.Requests, d.IO.Reads,
		d.IO.Writes, d.IO.Flushes, d.IO.Discards, d.IO.Inflight, d.IO.Errors))
	c.field("data", fmt.Sprintf("%s read, %s written", humanSize(d.IO.BytesRead), humanSize(d.IO.BytesWritten)))
	if len(d.Connections) > 0 {
		c.printf("\n")
		c.printConnections(d.Connections)
	}
	if len(d.Snapshots) > 0 {
		c.printf("\n")
		c.printSnapshotList(d.Snapshots)
	}
	if len(d.Bitmaps) > 0 {
		c.printf("\n")
		c.printBitmapList(d.Bitmaps)
	}
}

func (c *controller) printConnections(list []daemon.ClientStatus) {
	c.table("CLIENT SINCE REQUESTS READ WRITTEN IN-FLIGHT EXPORT PEER", func(row func(...string)) {
		for _, x := range list {
			row(count(x.ID), x.Since.Local().Format(time.DateTime), count(x.IO.Requests), humanSize(x.IO.BytesRead), humanSize(x.IO.BytesWritten),
				count(x.IO.Inflight), nameOf(x.Export), printable(x.Peer))
		}
	})
}

func (c *controller) printSnapshotList(list []daemon.SnapshotStatus) {
	if len(list) == 0 {
		c.printf("No snapshots.\n")
		return
	}
	c.table("ID SNAPSHOT DATE DISK-SIZE VM-SIZE", func(row func(...string)) {
		for _, s := range list {
			row(printable(s.ID), nameOf(s.Name), s.Date.Local().Format(time.DateTime), size(s.DiskSize), humanSize(s.VMStateSize))
		}
	})
}

func (c *controller) printBitmapList(list []daemon.BitmapStatus) {
	if len(list) == 0 {
		c.printf("No dirty bitmaps.\n")
		return
	}
	c.table("BITMAP GRANULARITY STATE", func(row func(...string)) {
		for _, b := range list {
			state := "disabled"
			switch {
			case b.Inconsistent:
				state = "inconsistent: can only be removed"
			case b.Enabled:
				state = "enabled"
			}
			if b.Served {
				state += ", served"
			}
			row(nameOf(b.Name), size(b.Granularity), state)
		}
	})
}

func (c *controller) printResized(r *daemon.ResizeReply) {
	if r.Size == r.OldSize {
		c.printf("The disk had this size already.\n")
		return
	}
	c.printf("Resized from %s to %s (%d bytes).\n", size(r.OldSize), size(r.Size), r.Size)
	if r.Note != "" {
		c.printf("Note: %s.\n", r.Note)
	}
}

// checkReport is what a live check has found, as that of 'drover check' has it.
func checkReport(r *daemon.CheckReply) *qcow2.CheckReport {
	return &qcow2.CheckReport{
		CheckErrors: r.CheckErrors, Corruptions: r.Corruptions, Leaks: r.Leaks, ImageEndOffset: r.ImageEndOffset,
		TotalClusters: r.Total, AllocatedClusters: r.Allocated, FragmentedClusters: r.Fragmented, CompressedClusters: r.Compressed,
	}
}

func (c *controller) printChecked(r *daemon.CheckReply) {
	for _, f := range r.Findings {
		fmt.Fprintln(c.err, f)
	}
	if r.Dropped > 0 {
		fmt.Fprintf(c.err, "... and %d more\n", r.Dropped)
	}
	c.printCheckText(checkReport(r))
}

func (c *controller) printStats(s *serverStats) {
	v := &s.Server
	c.printf("%s %s, process %d, since %s\n", v.Kind, v.Version, v.PID, v.Started.Local().Format(time.DateTime))
	c.printf("%d disks, %d clients, %s of %s of metadata cache\n", v.Disks, v.Clients, size(v.CacheBytes), size(v.CacheLimit))
	if len(s.Disks) == 0 {
		return
	}
	c.printf("\n")
	c.table("NAME READS WRITES FLUSHES DISCARDS READ WRITTEN IN-FLIGHT ERRORS CACHE", func(row func(...string)) {
		for _, d := range s.Disks {
			io := d.IO
			row(nameOf(d.Name), count(io.Reads), count(io.Writes), count(io.Flushes), count(io.Discards), humanSize(io.BytesRead),
				humanSize(io.BytesWritten), count(io.Inflight), count(io.Errors), size(d.CacheBytes))
		}
	})
}
