package tracectxtest

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
)

// Tree is one trace.
type Tree struct {
	TraceID string
	Roots   []*Node  // spans without a parent; one, if the trace is unbroken
	Faults  []string // what is broken; none: the trace is one piece
}

// Node is a span in a tree, with the spans that continue it: children in its own
// segment, and those of other segments that refer to it.
type Node struct {
	Segment  *Segment
	Span     *Span
	Children []*Node
}

// Broken returns everything that is wrong with the traces of these segments, each
// fault with its trace; none means that every trace is one piece. See Trees.
func Broken(segments []*Segment) []string {
	var all []string
	for _, t := range Trees(segments) {
		for _, fault := range t.Faults {
			all = append(all, "trace "+t.TraceID+": "+fault)
		}
	}
	return all
}

// Trees puts segments together to traces, in the order in which the traces began.
// A segment that is there twice counts once. A trace is broken
//
//   - if a span refers to a span, or has a parent, that is not there,
//   - if a reference says another trace, service or instance than its target has,
//   - if a reference from another process points to anything but an ExitSpan, or its
//     network address is not that ExitSpan's peer,
//   - if more than one span has no parent, or spans are each other's parents.
//
// Order and faults depend on the segments alone, not on the order they are given in.
func Trees(segments []*Segment) []*Tree {
	f := newForest(segments)
	byTrace := make(map[string]*Tree)
	var trees []*Tree
	for _, n := range f.nodes {
		t := byTrace[n.Segment.TraceID]
		if t == nil {
			t = &Tree{TraceID: n.Segment.TraceID}
			byTrace[t.TraceID] = t
			trees = append(trees, t)
		}
		parent, faults := f.parent(n)
		t.Faults = append(t.Faults, faults...)
		if parent == nil {
			t.Roots = append(t.Roots, n)
		} else {
			parent.Children = append(parent.Children, n)
		}
	}
	// What no root leads to hangs in a circle.
	reached := make(map[*Node]bool)
	for _, t := range trees {
		for _, root := range t.Roots {
			root.walk(0, func(n *Node, _ int) { reached[n] = true })
		}
		if len(t.Roots) > 1 {
			t.Faults = append(t.Faults, fmt.Sprintf("%d spans have no parent: %s", len(t.Roots), names(t.Roots)))
		}
	}
	for _, n := range f.nodes {
		if !reached[n] {
			t := byTrace[n.Segment.TraceID]
			t.Faults = append(t.Faults, fmt.Sprintf("%s is among its own ancestors, or below a span that is", n.name()))
		}
	}
	return trees
}

// forest has the nodes of all traces, in order of their start.
type forest struct {
	nodes    []*Node
	segments map[string]*Segment
	spans    map[spanKey]*Node
}

type spanKey struct {
	segment string
	span    int32
}

func newForest(segments []*Segment) *forest {
	f := &forest{segments: make(map[string]*Segment), spans: make(map[spanKey]*Node)}
	for _, s := range segments {
		if f.segments[s.ID] != nil {
			continue
		}
		f.segments[s.ID] = s
		for _, sp := range s.Spans {
			n := &Node{Segment: s, Span: sp}
			f.nodes = append(f.nodes, n)
			f.spans[spanKey{s.ID, sp.ID}] = n
		}
	}
	slices.SortStableFunc(f.nodes, func(a, b *Node) int {
		return cmp.Or(
			a.Span.Start.Compare(b.Span.Start),
			cmp.Compare(a.Segment.Service, b.Segment.Service),
			cmp.Compare(a.Segment.ID, b.Segment.ID),
			cmp.Compare(a.Span.ID, b.Span.ID),
		)
	})
	return f
}

// parent returns the node that n continues, nil if there is none, and what is wrong
// with the way it says so. Of several references the first that resolves counts.
func (f *forest) parent(n *Node) (*Node, []string) {
	if n.Span.Parent >= 0 {
		p := f.spans[spanKey{n.Segment.ID, n.Span.Parent}]
		if p == nil {
			return nil, []string{fmt.Sprintf("%s: its parent, span %d, is not in the segment", n.name(), n.Span.Parent)}
		}
		return p, nil
	}
	var parent *Node
	var faults []string
	for _, ref := range n.Span.Refs {
		target := f.spans[spanKey{ref.SegmentID, ref.SpanID}]
		if target == nil {
			faults = append(faults, fmt.Sprintf("%s refers to span %d of segment %s, which is not there", n.name(), ref.SpanID, printable(ref.SegmentID)))
			continue
		}
		if parent == nil {
			parent = target
		}
		for _, fault := range mismatches(n, ref, target) {
			faults = append(faults, fmt.Sprintf("%s refers to %s, but %s", n.name(), target.name(), fault))
		}
	}
	return parent, faults
}

func mismatches(n *Node, ref Ref, target *Node) []string {
	var faults []string
	differ := func(what, have, want string) {
		if have != want {
			faults = append(faults, fmt.Sprintf("%s is %q there and %q in the reference", what, want, have))
		}
	}
	differ("the trace id", ref.TraceID, target.Segment.TraceID)
	if n.Segment.TraceID != ref.TraceID {
		faults = append(faults, fmt.Sprintf("the reference is of trace %q, itself of %q", ref.TraceID, n.Segment.TraceID))
	}
	differ("the service", ref.Service, target.Segment.Service)
	differ("the instance", ref.Instance, target.Segment.Instance)
	if ref.Kind == CrossProcess {
		if target.Span.Kind != Exit {
			faults = append(faults, "no ExitSpan is there")
		} else {
			differ("the network address", ref.Peer, target.Span.Peer)
		}
	}
	return faults
}

// name identifies a span to a reader, on one line.
func (n *Node) name() string {
	return printable(fmt.Sprintf("%s %s %s (span %d of segment %s)",
		n.Segment.Service, n.Span.Kind, n.Span.Operation, n.Span.ID, n.Segment.ID))
}

func names(nodes []*Node) string {
	var all []string
	for _, n := range nodes {
		all = append(all, n.name())
	}
	return strings.Join(all, ", ")
}

// walk visits n and everything below it, parents first.
func (n *Node) walk(depth int, visit func(n *Node, depth int)) {
	visit(n, depth)
	for _, child := range n.Children {
		child.walk(depth+1, visit)
	}
}

// Write prints the tree: a line for the trace, one for each span, indented below
// what it continues, and one for each fault.
func (t *Tree) Write(w io.Writer) error {
	verdict := "unbroken"
	if len(t.Faults) > 0 {
		verdict = "BROKEN"
	}
	var text strings.Builder
	fmt.Fprintf(&text, "trace %s  %s\n", printable(t.TraceID), verdict)
	table := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	for _, root := range t.Roots {
		root.walk(1, func(n *Node, depth int) {
			sp := n.Span
			call := sp.Operation
			if sp.Peer != "" && sp.Kind == Exit {
				call += " -> " + sp.Peer
			}
			took := float64(sp.End.Sub(sp.Start)) / float64(time.Millisecond)
			fmt.Fprintf(table, "%s%s\t%s\t%s\t%.1f ms", strings.Repeat("  ", depth), printable(n.Segment.Service), sp.Kind, printable(call), took)
			if sp.Failed {
				fmt.Fprint(table, "\terror")
			}
			fmt.Fprintln(table)
		})
	}
	_ = table.Flush() // a strings.Builder takes everything
	for _, fault := range t.Faults {
		fmt.Fprintf(&text, "  broken: %s\n", fault)
	}
	_, err := io.WriteString(w, text.String())
	return err
}

// printable keeps what agents report from moving the reader's terminal about.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return unicode.ReplacementChar
		}
		return r
	}, s)
}
