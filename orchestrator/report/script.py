"""The page's own script: hover values, logarithmic axes and smoothing of curves, sorting and filtering of tables.

It loads nothing and keeps nothing; without it the page shows the same, with the browser's own tooltips.
"""

from __future__ import annotations

import base64
import hashlib

SCRIPT = r"""(function(){'use strict';
var all=function(q,n){return Array.prototype.slice.call((n||document).querySelectorAll(q))};
var tip=document.createElement('div');tip.className='tip';tip.hidden=true;document.body.appendChild(tip);
function show(e,text){tip.textContent=text;tip.hidden=false;
 var w=tip.offsetWidth,h=tip.offsetHeight,x=e.clientX+14,y=e.clientY+14;
 if(x+w>innerWidth-4)x=Math.max(4,e.clientX-w-10);if(y+h>innerHeight-4)y=Math.max(4,e.clientY-h-10);
 tip.style.left=x+'px';tip.style.top=y+'px'}
function num(v){return Math.abs(v)>=1e5||(v&&Math.abs(v)<1e-3)?v.toExponential(3):String(+v.toPrecision(5))}
all('svg title').forEach(function(t){var p=t.parentNode;p.setAttribute('data-t',t.textContent);
 p.setAttribute('aria-label',t.textContent);p.removeChild(t)});
function pairs(text){return text.trim().split(/\s+/).map(function(p){return p.split(',').map(Number)})}
function unmap(p,v0,v1,p0,p1){return v0+(p-p0)/((p1-p0)||1)*(v1-v0)}
function map(v,v0,v1,p0,p1,log){
 if(log){if(v<=0)return null;v=Math.log(v);v0=Math.log(v0);v1=Math.log(v1)}
 return p0+(v-v0)/((v1-v0)||1)*(p1-p0)}
function smooth(points,width){if(!width)return points;return points.map(function(p,i){var s=0,n=0;
 for(var j=Math.max(0,i-width);j<=Math.min(points.length-1,i+width);j++){s+=points[j][1];n++}return[p[0],s/n]})}
all('svg[data-axes]').forEach(function(svg){
 var a=svg.getAttribute('data-axes').split(' ').map(Number);
 function values(points){return points.map(function(p){
  return[unmap(p[0],a[0],a[1],a[2],a[3]),unmap(p[1],a[4],a[5],a[6],a[7])]})}
 var lines=all('g.line',svg).map(function(g){var c=g.querySelector('polyline');
  return{g:g,c:c,name:g.getAttribute('data-name'),own:values(pairs(c.getAttribute('points')))}});
 var bands=all('polygon.band',svg).map(function(c){
  return{c:c,name:c.getAttribute('data-name'),own:values(pairs(c.getAttribute('points')))}});
 var state={x:false,y:false,w:0};
 function px(v){return map(v,a[0],a[1],a[2],a[3],state.x)}
 function py(v){return map(v,a[4],a[5],a[6],a[7],state.y)}
 function text(points){return points.map(function(p){return[px(p[0]),py(p[1])]}).filter(function(p){
  return p[0]!==null&&p[1]!==null}).map(function(p){return p[0].toFixed(1)+','+p[1].toFixed(1)}).join(' ')}
 function draw(){
  lines.forEach(function(l){l.now=smooth(l.own,state.w);l.c.setAttribute('points',text(l.now))});
  bands.forEach(function(b){b.c.setAttribute('points',text(b.own));b.c.style.visibility=state.w?'hidden':''});
  [['data-vx','x',px],['data-vy','y',py]].forEach(function(k){all('['+k[0]+']',svg).forEach(function(m){
   var p=k[2](+m.getAttribute(k[0])),off=p===null||!isFinite(p);m.style.visibility=off?'hidden':'';if(off)return;
   if(m.tagName==='text')m.setAttribute(k[1],p+(k[1]==='y'?4:0));
   else{m.setAttribute(k[1]+'1',p);m.setAttribute(k[1]+'2',p)}})})}
 var cursor=document.createElementNS('http://www.w3.org/2000/svg','line');cursor.setAttribute('class','cursor');
 cursor.setAttribute('y1',a[7]);cursor.setAttribute('y2',a[6]);cursor.style.visibility='hidden';svg.appendChild(cursor);
 svg.moved=function(e){
  var m=svg.getScreenCTM();if(!m)return;var x=(e.clientX-m.e)/m.a,y=(e.clientY-m.f)/m.d;
  if(x<Math.min(a[2],a[3])-4||y>Math.max(a[6],a[7])+4){svg.left();return}
  var found=lines.filter(function(l){return l.g.style.display!=='none'}).map(function(l){var best=null;
   (l.now||l.own).forEach(function(p){var d=Math.abs(px(p[0])-x);if(!best||d<best.d)best={d:d,p:p}});
   return{name:l.name,p:best.p,near:Math.abs(py(best.p[1])-y)}});
  if(!found.length){svg.left();return}
  found.sort(function(u,v){return u.near-v.near});var at=found[0].p[0],c=px(at);
  cursor.setAttribute('x1',c);cursor.setAttribute('x2',c);cursor.style.visibility='';
  show(e,svg.getAttribute('data-x')+' '+num(at)+'\n'+found.slice(0,12).map(function(f){
   return f.name+': '+num(f.p[1])}).join('\n')+(found.length>12?'\n...':''))};
 svg.left=function(){cursor.style.visibility='hidden';tip.hidden=true};
 all('g.key',svg).forEach(function(k){k.style.cursor='pointer';k.addEventListener('click',function(){
  var name=k.getAttribute('data-name'),off=!k.classList.contains('off');k.classList.toggle('off',off);
  lines.concat(bands).forEach(function(l){if(l.name===name)(l.g||l.c).style.display=off?'none':''})})});
 var tools=document.createElement('div');tools.className='tools';
 function box(label,which){var l=document.createElement('label'),i=document.createElement('input');i.type='checkbox';
  i.addEventListener('change',function(){state[which]=i.checked;draw()});l.appendChild(i);
  l.appendChild(document.createTextNode(' '+label));tools.appendChild(l)}
 if(a[4]>0)box('log y','y');if(a[0]>0)box('log x','x');
 if(lines.some(function(l){return l.own.length>12})){
  var l=document.createElement('label'),i=document.createElement('input');
  i.type='range';i.min=0;i.max=30;i.value=0;i.addEventListener('input',function(){state.w=+i.value;draw()});
  l.appendChild(document.createTextNode('smoothing '));l.appendChild(i);tools.appendChild(l)}
 if(tools.childNodes.length)svg.parentNode.appendChild(tools)});
all('image[data-map]').forEach(function(im){
 var m=JSON.parse(im.getAttribute('data-map')),picture=new Image(),pixels=null;
 picture.onload=function(){var c=document.createElement('canvas');c.width=m.columns;c.height=m.rows;
  var k=c.getContext('2d');k.drawImage(picture,0,0);pixels=k.getImageData(0,0,m.columns,m.rows).data};
 picture.src=im.getAttribute('href');
 im.moved=function(e){var b=im.getBoundingClientRect();
  var x=Math.min(m.columns-1,Math.max(0,Math.floor((e.clientX-b.left)/b.width*m.columns)));
  var y=Math.min(m.rows-1,Math.max(0,Math.floor((e.clientY-b.top)/b.height*m.rows)));
  if(!pixels)return;var o=4*(y*m.columns+x),s=(pixels[o+3]/255-m.least)/(m.most-m.least);
  if(!pixels[o+3]){tip.hidden=true;return}
  var v=m.centre===null?m.low+s*(m.high-m.low):m.centre+(pixels[o]>pixels[o+2]?1:-1)*s*m.reach;
  function name(k,i){return m.names[k]?m.names[k][i]:'expert '+i}
  show(e,name(0,y)+', '+name(1,x)+': about '+num(v))}});
var over=null;
document.addEventListener('pointermove',function(e){var t=e.target;if(!t.closest)return;
 var svg=t.closest('svg[data-axes]');if(over&&over!==svg&&over.left)over.left();over=svg;
 if(svg){svg.moved(e);return}
 if(t.moved){t.moved(e);return}
 var g=t.closest('[data-t]');if(g)show(e,g.getAttribute('data-t'));else tip.hidden=true});
document.addEventListener('pointerdown',function(e){if(e.target.moved)e.target.moved(e)});
document.addEventListener('scroll',function(){tip.hidden=true},true);
all('table.sortable').forEach(function(table){
 var body=table.tBodies[0],heads=all('th[data-c]',table.tHead),box=table.closest('.scroll');
 heads.forEach(function(h){h.tabIndex=0;function sort(){
  var up=h.getAttribute('aria-sort')!=='ascending',c=+h.getAttribute('data-c');
  heads.forEach(function(o){o.removeAttribute('aria-sort')});h.setAttribute('aria-sort',up?'ascending':'descending');
  function key(r){var d=r.cells[c],v=d.getAttribute('data-v');return v===null?d.textContent:(v===''?null:+v)}
  all('tr',body).sort(function(p,q){var u=key(p),v=key(q);if(u===null||v===null)return(u===null)-(v===null);
   return(u<v?-1:u>v?1:0)*(up?1:-1)}).forEach(function(r){body.appendChild(r)})}
  h.addEventListener('click',function(e){if(e.target.tagName!=='A')sort()});
  h.addEventListener('keydown',function(e){if(e.key==='Enter'&&e.target===h)sort()})});
 var l=document.createElement('label'),i=document.createElement('input'),tools=document.createElement('div');
 tools.className='tools screen';i.type='search';i.placeholder='words of its setting';
 l.appendChild(document.createTextNode('show only '));l.appendChild(i);tools.appendChild(l);
 i.addEventListener('input',function(){var words=i.value.toLowerCase().split(/\s+/);all('tr',body).forEach(function(r){
  var t=r.cells[0].textContent.toLowerCase();r.hidden=!words.every(function(w){return t.indexOf(w)>=0})})});
 box.parentNode.insertBefore(tools,box)});
all('.scroll,.figure').forEach(function(box){
 var hint=document.createElement('p');hint.className='hint screen';hint.hidden=true;
 box.parentNode.insertBefore(hint,box.nextSibling);
 function look(){var right=box.scrollWidth-box.clientWidth-box.scrollLeft,n=0,more='';
  if(right>2&&box.classList.contains('figure'))more='the figure goes on to the right \u2192';
  else if(right>2){var edge=box.getBoundingClientRect().right;var row=box.querySelector('tbody tr');
   if(row)n=all('th,td',row).filter(function(c){return c.getBoundingClientRect().right>edge+2}).length;
   if(n)more=n+' more column'+(n>1?'s':'')+' to the right \u2192'}
  hint.hidden=!more;hint.textContent=more}
 box.addEventListener('scroll',look,{passive:true});addEventListener('resize',look);
 all('details').forEach(function(d){d.addEventListener('toggle',look)});look()});
addEventListener('beforeprint',function(){all('details').forEach(function(d){d.open=true})});
})();"""

HASH = "sha256-" + base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
